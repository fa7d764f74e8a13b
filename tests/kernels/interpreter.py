"""Kernels on a CPU in Triton's interpreter: what the files interpreted_*.py share.

Triton reads the flag TRITON_INTERPRET when a kernel is decorated, and an interpreted kernel cannot
be compiled. So pytest does not collect these files: test_kernels.py runs each in its own process.
By hand, with the table of errors at the end:

    TRITON_INTERPRET=1 python -m pytest -n0 -s tests/kernels/interpreted_attention.py
"""

from functools import cache

import numpy as np
import pytest
import torch
from minisd_kernels.ops import attention as flash_attention, launch
from torch import Tensor
from triton import language as tl
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    InterpreterOptions,
    TensorHandle,
    _patch_lang,
    interpreter_builder,
)

if not launch.interpreted(flash_attention._kernel):
    pytest.exit("run it with TRITON_INTERPRET=1, in a process of its own", returncode=2)

DTYPES = pytest.mark.parametrize("dtype", launch.DTYPES, ids=lambda dtype: str(dtype)[6:])
CANARY = 7.0
# Checking for integer overflows takes half of the time, and all sizes here are small.
interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
# A helper prepares triton.language at every call, which takes a third; what it changes stays so.
prepared = cache(_patch_lang)


def _call(self, *args, **named):
    prepared(self.fn)
    return self.rewrite()(*args, **named)


InterpretedFunction.__call__ = _call

# The interpreter stores bfloat16 as uint16, and has two bugs with it that a GPU does not have.
plain_dot, plain_trunc = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc


def _dot(self, a, b, *rest):
    """Multiply values: the interpreter multiplies their bits, as integers."""
    if a.dtype == tl.bfloat16:
        a, b = (self.create_fp_ext(x, tl.float32) for x in (a, b))
    return plain_dot(self, a, b, *rest)


def _trunc(self, x, to):
    """Round to the nearest bfloat16: the interpreter truncates the last 16 bits."""
    if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
        return plain_trunc(self, x, to)
    rounded = torch.tensor(x.data).to(torch.bfloat16).view(torch.int16)
    return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)


InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc = _dot, _trunc


def corrections_needed() -> tuple[bool, bool]:
    """Whether this Triton still has the two bugs: in products, and in rounding."""
    one = TensorHandle(np.full((1, 1), 0x3F80, np.uint16), tl.bfloat16)
    zero = TensorHandle(np.zeros((1, 1), np.float32), tl.float32)
    product = plain_dot(interpreter_builder, one, one, zero, None, 0)
    above = TensorHandle(np.full((1, 1), 1 + 3 * 2**-9, np.float32), tl.float32)
    cut = plain_trunc(interpreter_builder, above, tl.bfloat16)
    return product.data.item() != 1.0, cut.data.item() == 0x3F80


def embed(x: Tensor, margins: tuple[int, ...], around: float) -> tuple[Tensor, Tensor]:
    """Copy x into a larger tensor, filled with ``around``: the view of x, and that tensor."""
    whole = x.new_full([n + 2 * margin for n, margin in zip(x.shape, margins)], around)
    view = whole
    for axis, margin in enumerate(margins):
        view = view.narrow(axis, margin, x.shape[axis])
    return view.copy_(x), whole


def take(view: Tensor, whole: Tensor) -> Tensor:
    """The content of the view, after checking that nothing was written around it."""
    result = view.clone()
    view.fill_(CANARY)
    assert (whole == CANARY).all(), "written outside of the result"
    return result


_worst: dict[tuple[str, str], float] = {}


def compare(kernel: str, out: Tensor, torchs: Tensor, exact: Tensor, times: int = 2) -> None:
    """The error is at most ``times`` torch's in this dtype, plus one rounding of the largest value.

    Twice, because another order of sums has another error of the same size; the rounding, because
    torch may be exact by luck (with one key, the result is that value itself).
    """
    error, yardstick = ((x.double() - exact).abs().max().item() for x in (out, torchs))
    rounding = torch.finfo(out.dtype).eps / 2 * exact.abs().max().item()
    row = kernel, str(out.dtype)[6:]
    _worst[row] = max(_worst.get(row, 0), error / max(yardstick, rounding))
    said = f"{kernel}: error {error:.3g}, torch's {yardstick:.3g}, one rounding {rounding:.3g}"
    assert error <= times * yardstick + rounding < float("inf"), said


@pytest.fixture(scope="module", autouse=True)
def table():
    """With -s: the worst error as a multiple of torch's, or of one rounding if that is larger."""
    yield
    print("\n" + "\n".join(f"{k:30} {dtype:9} {ratio:.2f}" for (k, dtype), ratio in _worst.items()))
