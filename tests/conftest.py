"""The state in which every test starts: one thread, no network, no gradients."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch

# The tensors are tiny: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients():
    """No gradients, and the same state of the global generator for every test."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield
