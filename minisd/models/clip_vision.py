"""CLIP's image tower: the only place where a whole image becomes one vector.

A vision transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929) cuts the image into
patches, each of which is a token, and puts a learned class token before them. All tokens attend to
each other; what the class token has become in the end is projected into the space that CLIP's
images and texts share (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

Stable Diffusion 1's safety checker has OpenAI's ViT-L/14, Stable unCLIP this one or OpenCLIP's
ViT-H/14. Parameters carry the names of transformers' CLIPVisionModelWithProjection.

B batch, H W height and width in pixels, L patches (256), D width of a token, E of the embedding
"""

import torch
from torch import Tensor, nn

from minisd.config import VisionConfig
from minisd.models.clip import NORM_EPS, Encoder, table
from minisd.models.ops import Ops


class Embeddings(nn.Module):
    """The class token and the image's patches, plus a learned vector for each position."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, side = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, side, stride=side, bias=False)
        self.position_embedding = table(1 + (config.image_size // side) ** 2, width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).mT                 # (B, L, D)
        first = self.class_embedding.expand(len(images), 1, -1)              # (B, 1, D)
        tokens = torch.cat([first, patches], dim=1)                          # (B, L+1, D)
        return tokens + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) -> the class token after all layers (B, D)."""

    def __init__(self, config: VisionConfig, ops: Ops):
        super().__init__()
        self.embeddings = Embeddings(config)
        # CLIP norms the tokens before the first layer too, unlike the text encoder. The name is
        # misspelt in every published file.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, NORM_EPS)
        self.encoder = Encoder(config, ops, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(images))                       # (B, L+1, D)
        x = self.encoder(x)
        return self.post_layernorm(x[:, 0])                                  # (B, D)


class VisionTower(nn.Module):
    """Images (B, 3, 224, 224), as images.to_clip prepares them -> embeddings (B, E).

    They are not of length 1: Stable unCLIP was trained with them as they are.
    """

    def __init__(self, config: VisionConfig, ops: Ops):
        super().__init__()
        self.vision_model = VisionTransformer(config, ops)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        own = self.visual_projection.weight
        embeds = self.visual_projection(self.vision_model(images.to(own)))   # (B, E)
        return embeds.to(images)


class ImageNormalizer(nn.Module):
    """The mean and standard deviation of the embeddings that Stable unCLIP was trained with.

    They are 0 and 1 for ViT-H/14, and another number of each channel for ViT-L/14.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1, width))
        self.std = nn.Parameter(torch.ones(1, width))
