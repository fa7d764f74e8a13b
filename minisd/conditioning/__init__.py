"""Where x starts, and what the UNet is told besides x, t and the prompt.

start.py    noise, image to image; the shape that all of these functions have
inpaint.py  inpainting, with a model trained for it and with any other
depth.py    the depth of each cell
upscale.py  a small image, to be made large
unclip.py   what an image is like: its embedding, with noise
"""

from collections.abc import Callable

from minisd.conditioning import depth, inpaint, unclip, upscale
from minisd.conditioning.start import Given, Start, image_to_image, text_to_image
from minisd.errors import warn


def drawn(given: Given) -> Start:
    """From noise, or from the image that is given, or from that where it is masked."""
    if given.plan.image is None:
        return text_to_image(given)
    return image_to_image(given) if given.plan.mask_image is None else inpaint.by_blending(given)


# How a call of each kind of model (config.KINDS) starts.
STARTS: dict[str, Callable[[Given], Start]] = {
    "text to image": drawn,
    "inpainting": inpaint.by_channels,
    "depth": depth.start,
    "upscaling": upscale.start,
    "image variation": unclip.start,
}


def start(given: Given) -> Start:
    """The start for what is given, and for the kind of model."""
    if given.plan.mask_image is not None:
        cells = inpaint.in_cells(given.mask, given.noise.like)               # (1, 1, h, w)
        if not cells.any():
            h, w = cells.shape[-2:]
            warn("the mask repaints nothing: reduced to the latent's "
                 f"{w}x{h} cells, of {given.mask.shape[-1] // w} pixels a side, it is dark or "
                 "transparent in all of them")
    return STARTS.get(given.plan.config.kind, drawn)(given)
