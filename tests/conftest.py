"""The state in which every test starts: one thread, no network, no gradients.

pytest runs in as many processes as there are cores, or with `-n0` in its own alone.
"""

import gc
import os
import threading

# The tensors are tiny: more threads only wait for each other, here and in the processes of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop():
    """Without it a tenth of the time goes into looking for garbage among all that is imported."""
    gc.freeze()
    gc.set_threshold(10_000)
    result = yield
    gc.unfreeze()
    return result


@pytest.fixture(autouse=True)
def _no_gradients():
    """No gradients, and the same state of the global generator for every test."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    # A library that fails while it loads a model can leave another one behind.
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def hub():
    """A Hub on the loopback address."""
    from small_hub import Hub

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
