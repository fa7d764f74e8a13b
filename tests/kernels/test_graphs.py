"""CUDA graphs without a GPU: what they are given, where they are recorded, how many are kept."""

import copy
import pickle
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from minisd_kernels.fused.decoder import FusedDecoder
from minisd_kernels.fused.graph import MOST, Graph, Graphs
from minisd_kernels.fused.steps import Steps, advance, weights
from minisd_kernels.fused.unet import FusedUNet
from small_models import AUTOENCODER, SMALL, randn, randomise

from minisd.models.ops import REFERENCE, TORCH
from minisd.models.unet import UNet
from minisd.models.vae import VAE
from minisd.samplers.ddim import ddim
from minisd.samplers.sampler import coefficients
from minisd.samplers.schedule import Ladder, Level


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_inputs_of_a_graph(eta, monkeypatch):
    """Its buffers get the inputs of each step and prompt; here a replay is one more call."""
    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: nullcontext())
    unet = randomise(UNet(SMALL.unet, REFERENCE))
    x = -0.3 + randn(2, 3, 4, 4, 6)
    prompt = 0.2 + randn(6, 7, unet.config.cross_attention_dim, seed=1)
    fused, noise = FusedUNet(unet, TORCH), randn(*x.shape[1:], seed=2) if eta > 0 else None
    ladder = Ladder([Level(9, 0.1), Level(5, 0.5), Level(1, 0.9)], [])
    table = weights(coefficients(ddim(ladder, eta), "epsilon"), 7.5)
    one, other = (Steps(fused, context, [981, 1], table, noisy=eta > 0)
                  for context in (prompt, -prompt))
    given = [((y, steps.times[i], steps.table[i], noise, None), steps.fixed)
             for steps, y, i in ((one, x, 0), (one, 2 * x, 1), (other, x, 1), (one, x, 0))]
    graph = Graph(partial(advance, fused), *given[0], None)
    graph.graph.replay = lambda: graph.out.copy_(advance(fused, *graph.changing, *graph.fixed))
    for changing, fixed in given:
        assert torch.equal(graph.replay(changing, fixed), advance(fused, *changing, *fixed))


def test_a_graph_is_recorded_on_the_device_of_its_tensors(monkeypatch):
    """With any current device: streams are made, steps recorded and replayed on the device of x.

    The capture has a new stream: cuBLAS keeps a workspace for each stream, and a workspace from
    outside the graph may be freed while the graph still uses it.
    """
    held, seen = [], []

    @contextmanager
    def device_of(tensor):
        held.append(tensor)
        yield
        held.pop()

    def noting(name, result):
        return lambda *args, **options: seen.append((name, options, *held)) or result

    graph, stream = MagicMock(), MagicMock()
    graph.replay = noting("replay", None)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name, result in dict(Stream=stream, CUDAGraph=graph, graph=nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, noting(name, result))
    changing, fixed = (torch.zeros(1),), (None, torch.zeros(1))
    made = Graph(noting("call", torch.ones(1)), changing, fixed, (0, 1))
    made.replay(changing, fixed)
    assert [name for name, *_ in seen] == [
        "call", "CUDAGraph", "Stream", "graph", "call", "replay"]
    assert all(tensor is (made.out if name == "replay" else made.changing[0])
               for name, _, tensor in seen)
    assert [options for name, options, _ in seen if name == "graph"] == [
        {"pool": (0, 1), "stream": stream}]


def test_graphs_are_a_bounded_cache(monkeypatch):
    """One graph for a key, LRU; copies and pickles are empty; all graphs share one memory pool."""
    made, pools = [], iter("ab")

    class Recorded:
        def __init__(self, function, changing, fixed, pool):
            made.append(pool)
            self.function = function

        def replay(self, changing, fixed):
            return self.function(*changing, *fixed)

    monkeypatch.setattr("minisd_kernels.fused.graph.Graph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    graphs = Graphs()
    for key in [*range(MOST), 0, MOST, 0]:  # 1 is evicted, 0 is not
        assert graphs(key, lambda x, y: x + y, [key], [1]) == key + 1
    assert made == ["a"] * (MOST + 1) and len(graphs) == MOST
    with torch.inference_mode():  # buffers made there are read-only elsewhere
        assert not graphs(1, lambda: torch.zeros(1), []).is_inference()
    assert len(made) == MOST + 2 and len(graphs) == MOST
    assert len(copy.deepcopy(graphs)) == len(pickle.loads(pickle.dumps(graphs))) == 0
    graphs.clear()
    graphs(1, lambda: None, [])
    assert len(graphs) == 1 and made[-1] == "b"


def test_on_a_gpu_a_decoding_is_a_graph_for_each_size(monkeypatch):
    decoder = FusedDecoder(randomise(VAE(AUTOENCODER, REFERENCE)).decoder, TORCH)
    asked = []
    monkeypatch.setattr(decoder, "graphs", lambda key, function, given: asked.append(key))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class OnGPU(torch.Tensor):
        device = torch.device("cuda")

    for latent in (randn(1, 4, 3, 4), randn(1, 4, 3, 4), randn(1, 4, 4, 4)):
        decoder(latent.as_subclass(OnGPU))
    assert asked[0] == asked[1] != asked[2]
    with torch.enable_grad():  # no graph has a backward
        decoder(randn(1, 4, 3, 4).requires_grad_().as_subclass(OnGPU))
    assert len(asked) == 3
