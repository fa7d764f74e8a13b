"""Where x starts, and what the UNet is told besides x, t and the prompt.

start.py    noise, image to image; the shape that all of these functions have
inpaint.py  inpainting, with a model trained for it and with any other
"""

from minisd.conditioning import inpaint
from minisd.conditioning.start import Given, Start, image_to_image, text_to_image

# How a kind of model (config.KINDS) inpaints.
INPAINTS = {"text to image": inpaint.by_blending, "inpainting": inpaint.by_channels}


def start(given: Given) -> Start:
    """The start for what is given, and for the kind of model."""
    if given.image is None:
        return text_to_image(given)
    if given.mask is None:
        return image_to_image(given, given.image)
    return INPAINTS[given.plan.config.kind](given, given.image, given.mask)
