"""The safety checker of Stable Diffusion 1: how near an image is to each of 17 concepts.

CLIP's image tower turns the image into a vector. Where its cosine with a concept's vector is above
the concept's threshold, the image is flagged. Three more vectors, of "special care", flag nothing
themselves: an image that is near one of them meets thresholds that are 0.01 lower.

Vectors and thresholds are part of the weights; what they stand for was never published. Rando et
al. 2022, https://arxiv.org/abs/2210.04610, found that they cover sexual content, and nothing else.
Parameters carry the names of diffusers' StableDiffusionSafetyChecker.

B batch, D width of the embedding
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import VisionConfig
from minisd.models.clip_vision import VisionTower
from minisd.models.ops import Ops

CONCEPTS = 17
SPECIAL_CARE = 3
ADJUSTMENT = 0.01  # what special care lowers the thresholds by


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of each row of a (B, D) with each of b (N, D), in float32."""
    return F.normalize(a.float()) @ F.normalize(b.float()).mT                # (B, N)


def scores(special: Tensor, concepts: Tensor) -> Tensor:
    """Margins over the thresholds, of special care (B, 3) and of the concepts (B, 17) -> scores.

    They are rounded to three decimals, as in diffusers, so that a margin under 0.0005 is none.
    diffusers also adds the 0.01 to the scores of the later vectors of special care; that changes
    nothing, as one is enough.
    """
    care = (special.round(decimals=3) > 0).any(dim=1, keepdim=True)          # (B, 1)
    return (concepts + ADJUSTMENT * care).round(decimals=3)                  # (B, 17)


class ConceptScores(VisionTower):
    """Images (B, 3, 224, 224), as images.to_clip prepares them -> scores (B, 17), in float32.

    An image with any score above 0 is flagged.
    """

    def __init__(self, config: VisionConfig, ops: Ops):
        super().__init__(config, ops)
        self.concept_embeds = nn.Parameter(torch.empty(CONCEPTS, config.projection_dim))
        self.special_care_embeds = nn.Parameter(torch.empty(SPECIAL_CARE, config.projection_dim))
        # The thresholds, whatever their names say.
        self.concept_embeds_weights = nn.Parameter(torch.empty(CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.empty(SPECIAL_CARE))

    def forward(self, images: Tensor) -> Tensor:
        e = super().forward(images)                                          # (B, D)
        special = cosine(e, self.special_care_embeds) - self.special_care_embeds_weights.float()
        concepts = cosine(e, self.concept_embeds) - self.concept_embeds_weights.float()
        return scores(special, concepts)                                     # (B, 17)
