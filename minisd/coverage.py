"""Which of a UNet's attentions and GroupNorms a kernel takes, and why not the others.

The UNet is built and run without memory (torch's "meta" device), so this takes milliseconds for a
model of any size and needs no GPU.
"""

import torch

from minisd.config import UNetConfig
from minisd.ops import Call, Ops, watch
from minisd.unet import UNet


@torch.no_grad()
def coverage(
    config: UNetConfig, ops: Ops, height: int, width: int, dtype: torch.dtype, batch: int = 2,
) -> list[Call]:
    """Every call that one forward makes of ``ops``, in order.

    ``height`` and ``width`` are those of the latent; ``batch`` is 2 for one image with guidance.
    """
    calls: list[Call] = []
    with torch.device("meta"):
        unet = UNet(config, watch(ops, calls)).to(dtype)
        x = torch.empty(batch, config.in_channels, height, width, dtype=dtype)
        context = torch.empty(batch, 77, config.cross_attention_dim, dtype=dtype)
        unet(x, torch.empty(batch), context)
    return calls
