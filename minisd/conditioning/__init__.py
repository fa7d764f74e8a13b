"""Where x starts, and what the UNet is told besides x, t and the prompt.

start.py    noise, image to image; the shape that all of these functions have
inpaint.py  inpainting, with a model trained for it and with any other
unclip.py   an image's embedding with noise, as Stable unCLIP is told it
"""

from minisd.conditioning import inpaint
from minisd.conditioning.start import Given, Start, image_to_image, text_to_image
from minisd.errors import warn

# How a kind of model (config.KINDS) inpaints.
INPAINTS = {"text to image": inpaint.by_blending, "inpainting": inpaint.by_channels}


def start(given: Given) -> Start:
    """The start for what is given, and for the kind of model."""
    if given.image is None:
        return text_to_image(given)
    if given.mask is None:
        return image_to_image(given, given.image)
    cells = inpaint.in_cells(given.mask, given.noise.like)                   # (1, 1, h, w)
    if not cells.any():
        h, w = cells.shape[-2:]
        warn(
            f"the mask repaints nothing: reduced to the latent's {w}x{h} cells, of "
            f"{given.mask.shape[-1] // w} pixels a side, it is dark or transparent in all of them")
    return INPAINTS[given.plan.config.kind](given, given.image, given.mask)
