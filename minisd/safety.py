"""Which images Stable Diffusion 1's safety checker flags.

The network and its rule are in models/safety.py. A flag is told and changes no image:
`Output.blackened` makes the flagged images black.
"""

from collections.abc import Sequence
from os import PathLike

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from minisd import checks
from minisd.checkpoints import checkpoint
from minisd.checkpoints.vision_folder import read_safety_checker
from minisd.errors import WeightError
from minisd.images import Source, open_images, to_clip
from minisd.models.ops import TORCH
from minisd.models.safety import ConceptScores


class SafetyChecker(nn.Module):
    """``checker(images) -> list[bool]``: which images the checker that was published with Stable
    Diffusion 1 takes for sexual ones. It knows of nothing else, and is wrong both ways.
    """

    def __init__(self, network: ConceptScores, image_size: int):
        super().__init__()
        self.network, self.image_size = network, image_size

    @classmethod
    def load(cls, folder: str | PathLike, device: str | torch.device = "cpu",
             dtype: str | torch.dtype = "auto") -> "SafetyChecker":
        """The checker in a folder: "safety_checker" of the official Stable Diffusion 1, which
        `minisd download` does not fetch, or the model's folder around it.

        ``dtype`` "auto" is float32 on a CPU and float16 on a GPU. Raises FileNotFoundError, or
        WeightError (naming file and tensor) where the folder holds no safety checker.
        """
        device = checks.device(device)
        dtype = checks.dtype(dtype, device)
        config, tensors = read_safety_checker(checkpoint.locate(folder))
        with torch.device("meta"):
            network = ConceptScores(config, TORCH)
        if told := checkpoint.differences(tensors, network):
            file = next((tensor.path for tensor in tensors.values()), folder)
            raise WeightError(f"{file}, safety checker: {told}")
        checkpoint.copy_into(network, tensors, dtype, device)
        return cls(network.eval().requires_grad_(False), config.image_size)

    @torch.no_grad()
    def forward(self, images: Source | Sequence[Source] | Tensor | np.ndarray) -> list[bool]:
        """For each image, whether it is flagged.

        ``images``: a PIL image or a path, or a list of them; or pixels in [0, 1], a (B, 3, H, W)
        tensor or a (B, H, W, 3) array, which are rounded to 8 bits first. Raises ImageError for an
        image that cannot be read or used, and TypeError for what is none.
        """
        return [self._flags(image) for image in open_images(images)]

    def _flags(self, image: Image) -> bool:
        pixels = to_clip(image, self.image_size).to(self.network.visual_projection.weight)
        # Any score above 0; where half precision overflows, the score is NaN, and flags too.
        return not bool((self.network(pixels) <= 0).all())
