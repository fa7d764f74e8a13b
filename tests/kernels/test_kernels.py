"""The kernels without a GPU: values in the interpreter, rejected calls, plans, costs."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="the kernels need triton, which Linux alone has")

from minisd_kernels.ops import attention as fa, group_norm as gn, launch

INTERPRETED = sorted(Path(__file__).parent.glob("interpreted_*.py"))


def test_interpreted():
    """In a process of its own, with the flag TRITON_INTERPRET."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider",
         *INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"}, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        pytest.fail(done.stdout, pytrace=False)


def grow(d: int, batch: int = 1) -> torch.Tensor:
    """A tensor (batch, 1, 16) with a stride of d elements from row to row."""
    return torch.empty_strided((batch, 1, 16), (2**40, d, 1), device="meta")


X = torch.zeros(2, 5, 16)
META = X.to("meta")
LEARNT = X.clone().requires_grad_()
LONG = grow(2**31 - 1)
ATTENTION = [  # the message; q, k, v, heads
    ("q, k and v are (B, L, H*d)", X[0], X[0], X[0], 2),
    ("q, k and v are (B, L, H*d)", X, X, X[None], 2),
    ("shapes do not fit: q (2, 5, 16), k (2, 5, 16), v (2, 4, 16)", X, X, X[:, 1:], 2),
    ("shapes do not fit: q (1, 5, 16), k (2, 5, 16), v (2, 5, 16)", X[:1], X, X, 2),
    ("shapes do not fit: q (2, 5, 16), k (2, 5, 8), v (2, 5, 8)", X, X[..., :8], X[..., :8], 2),
    ("q (2, 0, 16) and k (2, 5, 16) do not split into 2 heads", X[:, :0], X, X, 2),
    ("q (2, 5, 16) and k (2, 0, 16) do not split into 2 heads", X, X[:, :0], X[:, :0], 2),
    ("q (2, 5, 16) and k (2, 5, 16) do not split into 0 heads", X, X, X, 0),
    ("q (2, 5, 16) and k (2, 5, 16) do not split into 3 heads", X, X, X, 3),
    *((f"a head of width {d}: it must be a multiple of 4 up to 256, or 512", *[X.new_empty(1, 1, d)]
       * 3, 1) for d in (2, 42, 260, 516)),
    ("dtypes differ: q torch.float32, k torch.float16, v torch.float32", X, X.half(), X, 2),
    ("the channels of k are not next to each other in memory", X, X.mT.contiguous().mT, X, 2),
    ("v is too long: one item passes 2^31 elements", LONG, LONG, grow(2**31), 2),
    ("q is torch.float64, not float16, bfloat16 or float32", *[X.double()] * 3, 2),
    ("k is on meta, not on cpu", X, META, X, 2),
    ("v requires a gradient, and the kernels have no backward", X, X, LEARNT, 2),
    ("the tensors are on cpu, and the Triton kernels run on a GPU", X, X, X, 2),
]

P, ROW = torch.zeros(2, 8, 6, 4), torch.zeros(8)
GROUP_NORM = [  # the message; x, weight, bias, groups, options
    ("x is (B, C, ...) with something in it, not (8,)", ROW, ROW, ROW, 2, {}),
    ("x is (B, C, ...) with something in it, not (2, 8, 0, 4)", P[:, :, :0], ROW, ROW, 2, {}),
    ("8 channels do not split into 3 groups", P, ROW, ROW, 3, {}),
    ("8 channels do not split into 0 groups", P, ROW, ROW, 0, {}),
    ("residual is (2, 8, 6, 1) torch.float32, x (2, 8, 6, 4) torch.float32",
     P, ROW, ROW, 2, dict(residual=P[..., :1])),
    ("return_sum is (2, 8, 6, 4) torch.float16, x (2, 8, 6, 4) torch.float32",
     P, ROW, ROW, 2, dict(return_sum=P.half())),
    ("x is neither NCHW nor channels_last", P[..., ::2], ROW, ROW, 2, {}),
    ("x is neither NCHW nor channels_last", P[..., :3], ROW, ROW, 2, {}),  # gaps between rows
    ("residual is neither NCHW nor channels_last",
     P, ROW, ROW, 2, dict(residual=P.mT.contiguous().mT)),
    ("return_sum is neither NCHW nor channels_last",
     P, ROW, ROW, 2, dict(return_sum=P[:, :, :1, :1].expand(P.shape))),
    ("x is too large: one item passes 2^31 elements",
     torch.empty_strided((1, 8, 8), (2**31, 2**28 - 1, 1), device="meta"), ROW, ROW, 2, {}),
    ("weight is (4,), not (8,) in a row", P, ROW[:4], ROW, 2, {}),
    ("bias is (8,), not (8,) in a row", P, ROW, torch.zeros(16)[::2], 2, {}),
    ("shift is (3, 8), not (8,) or (2, 8) in a row",
     P, ROW, ROW, 2, dict(shift=ROW.expand(3, 8))),
    ("x is torch.int32, not float16, bfloat16 or float32", P.int(), ROW, ROW, 2, {}),
    ("shift is torch.float64, not float16, bfloat16 or float32",
     P, ROW, ROW, 2, dict(shift=ROW.double())),
    ("bias is on meta, not on cpu", P, ROW, ROW.to("meta"), 2, {}),
    ("weight requires a gradient, and the kernels have no backward",
     P, ROW.clone().requires_grad_(), ROW, 2, {}),
    ("the tensors are on cpu, and the Triton kernels run on a GPU", P, ROW, ROW, 2, {}),
]


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(launch, "run", lambda calls: pytest.fail("a kernel was launched"))


@pytest.mark.parametrize("sentence, q, k, v, heads", ATTENTION)
def test_attention_rejects(sentence, q, k, v, heads, nothing_runs):
    with torch.enable_grad(), pytest.raises(ValueError) as raised:
        fa.flash_attention(q, k, v, heads)
    assert str(raised.value) == f"flash_attention: {sentence}"


@pytest.mark.parametrize("sentence, x, weight, bias, groups, options", GROUP_NORM)
def test_group_norm_rejects(sentence, x, weight, bias, groups, options, nothing_runs):
    with torch.enable_grad(), pytest.raises(ValueError) as raised:
        gn.group_norm_silu(x, weight, bias, groups, **options)
    assert str(raised.value) == f"group_norm_silu: {sentence}"


@pytest.mark.parametrize("options, sentence", [
    (dict(scale=0.0), "scale must be positive, not 0.0"),
    (dict(scale=-1.0), "scale must be positive, not -1.0"),
    (dict(scale=float("nan")), "scale must be positive, not nan"),
    (dict(precision="fp16"), "precision is one of ('ieee', 'tf32x3', 'tf32'), not 'fp16'"),
])
def test_attention_rejects_options(options, sentence, nothing_runs):
    with pytest.raises(ValueError, match=re.escape(f"flash_attention: {sentence}")):
        fa.flash_attention(META, META, META, 2, **options)


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
def test_attention_on_meta(dtype):
    """As on a GPU, without the launch. Under no_grad, tensors that require a gradient are taken."""
    q, k, v = torch.empty(2, 9, 3 * 80, dtype=dtype, device="meta").requires_grad_().chunk(3, -1)
    out = fa.flash_attention(q[:, :4], k, v, 2)
    assert (out.shape, out.dtype, out.device.type) == ((2, 4, 80), dtype, "meta")
    assert out.is_contiguous() and not out.requires_grad


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 6, 4), (2, 8, 90, 90)], ids=str)
def test_group_norm_on_meta(shape, dtype):
    """A slice of the channels of a larger tensor gives a contiguous result in the same layout."""
    row = torch.empty(8, dtype=dtype, device="meta")
    batch, _, *sides = shape
    nchw = torch.empty(batch, 24, *sides, dtype=dtype, device="meta")[:, 8:16]
    last = torch.empty(batch, *sides, 24, dtype=dtype, device="meta").movedim(-1, 1)[:, 8:16]
    for x in (nchw, last):
        for y in gn.group_norm_silu(x, row, row, 2, return_sum=True):
            assert (y.shape, y.dtype, y.device.type) == (x.shape, dtype, "meta")
            assert (y if x is nchw else y.movedim(1, -1)).is_contiguous()
        assert gn.group_norm_silu(x, row, row, 2, residual=x, return_sum=x)[1] is x


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """By default Triton launches on the current device, not on that of the arguments."""
    held, launches = [], []

    @contextmanager
    def device_of(tensor):
        held.append(tensor)
        yield
        held.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda first, *args, **options: launches.append((first, *held))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    one, other = torch.zeros(1), torch.zeros(1)
    launch.run([launch.Call(Kernel(), (1,), (x, other), {}, 4) for x in (one, META, other)])
    assert [[id(x) for x in seen] for seen in launches] == [[id(one)] * 2, [id(other)] * 2]


def test_the_longest_item():
    """The last offset of 32 bits is accepted; the tables above reject one more."""
    q = grow(2**31 - 1, batch=3)
    assert fa.flash_attention(q, q, q, 2).shape == q.shape
    x = torch.empty_strided((3, 8, 7), (2**40, 2**28 - 1, 1), device="meta")
    row = torch.empty(8, device="meta")
    assert gn.group_norm_silu(x, row, row, 2).shape == x.shape


def test_pieces_are_the_narrowest():
    """The narrowest cover of d by one or two powers of two; one piece if two are no narrower."""
    powers = [16 << i for i in range(6)]
    for d in range(4, 513, 4):
        a, b = fa.pieces(d)
        assert a in powers and b in (0, *powers) and b <= a
        covers = [sum(ways) for ways in product(powers, (0, *powers)) if sum(ways) >= d]
        assert a + b == min(covers)
        assert b == 0 or a + b not in powers


def test_attention_cost():
    q, k, v = (torch.empty(3, 5, n, 40, dtype=torch.float16, device="meta") for n in (130, 77, 77))
    with FlopCounterMode(display=False) as counter:
        out = (q @ k.mT).softmax(-1) @ v
    cost = fa.cost(3, 130, 77, 5, 40, q.itemsize)
    assert cost.flops == counter.get_total_flops()
    assert cost.bytes == sum(x.nbytes for x in (q, k, v, out))
    assert cost.exponentials == (q @ k.mT).numel()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("s", [False, True])
def test_group_norm_cost(residual, s):
    x = torch.empty(2, 40, 9, 7, dtype=torch.float16)
    moved = [x, x] + [x] * residual + [x] * s  # read, written, and again for each of the two
    cost = gn.cost(x.numel(), x.itemsize, residual=residual, s=s)
    assert cost.bytes == sum(tensor.nbytes for tensor in moved)
