"""What one UNet forward calls, and whether the Triton kernels take it, as a table for the README.

    python -m bench.coverage

The models are built without memory, so this takes a second and needs no GPU: whether a kernel takes
a call depends on sizes and dtype alone once the tensors are on a GPU. Needs triton.
"""

from collections import Counter

import torch
from minisd_kernels.flash_attention import flash_attention
from minisd_kernels.group_norm_silu import group_norm_silu

from minisd.config import SD1, SD2_V, Config
from minisd.coverage import coverage
from minisd.ops import Call, Ops

MODELS = {"SD1.5, 512x512": (SD1, 64), "SD2.1, 768x768": (SD2_V, 96)}


def kind(call: Call) -> str:
    """The row that a call belongs to."""
    if call.function == "group_norm_silu":
        return "GroupNorm and SiLU" if call.sizes.endswith("SiLU") else "GroupNorm alone"
    return "cross-attention" if call.sizes.endswith("x77") else "self-attention"


def cell(calls: list[Call]) -> str:
    """How many took a kernel, and of what sizes they were."""
    took = sum(call.took == "triton" for call in calls)
    sizes = Counter(call.sizes.removesuffix(", SiLU") for call in calls)
    return f"{took} of {len(calls)}: " + "; ".join(f"{size} ({n})" for size, n in sizes.items())


def column(config: Config, side: int) -> dict[str, str]:
    """One model's cells, by row, in float16 with guidance."""
    ops = Ops("triton", flash_attention, group_norm_silu)
    calls = coverage(config.unet, ops, side, side, torch.float16)
    rows = sorted({kind(call) for call in calls}, reverse=True)
    return {row: cell([call for call in calls if kind(call) == row]) for row in rows}


def table() -> str:
    """The Markdown table."""
    columns = {name: column(*model) for name, model in MODELS.items()}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | {' | '.join(cells[row] for cells in columns.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
