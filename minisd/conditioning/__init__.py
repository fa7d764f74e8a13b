"""Where x starts, and what the UNet is told besides x, t and the prompt.

start.py    noise, image to image; the shape that all of these functions have
inpaint.py  inpainting, with a model trained for it and with any other
"""

from minisd.conditioning import inpaint
from minisd.conditioning.start import Given, Start, image_to_image, text_to_image


def start(given: Given) -> Start:
    """The start for what is given: a row for each task and kind of model."""
    image, mask, config = given.image, given.mask, given.plan.config
    if image is None:
        return text_to_image(given)
    if mask is None:
        return image_to_image(given, image)
    reads_masks = config.unet.in_channels != config.vae.latent_channels
    return (inpaint.by_channels if reads_masks else inpaint.by_blending)(given, image, mask)
