"""Depth: a UNet trained for it is shown how near each cell of the latent is.

B images, H W height and width of a map, h w of the latent
"""

from minisd.conditioning.start import Given, Start, image_to_image, text_to_image
from minisd.depth_maps import normalised


def start(given: Given) -> Start:
    """From noise, or from an image, with the depth of each cell beside.

    It is that of the maps that are given, or what the estimator makes of the image.
    """
    plan, cells = given.plan, given.plan.depth_map
    begun = text_to_image(given) if plan.image is None else image_to_image(given)
    if cells is None:
        assert plan.image is not None
        _, _, h, w = plan.shape
        cells = normalised(given.estimate(plan.image), (h, w))               # (1, 1, h, w)
    return begun._replace(extra=cells.to(begun.x).expand(len(begun.x), -1, -1, -1))
