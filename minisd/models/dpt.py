"""The depth estimator: how near each pixel of an image is, which a depth model's UNet is shown.

DPT-hybrid of MiDaS 3.0: a ResNet, a ViT that reads its features as tokens, and convolutions that
join four maps taken on the way, from the smallest to the largest.

    image 3, H -> ResNet 256, H/4 -> 512, H/8 -> 1024, H/16 -> 12 ViT layers of 768
                        |               |                        |             |
                        |               |                   after the 9th  after the 12th, H/32
                        v               v                        v             v
    depth, H <- head <- fuse, H/2 <---- fuse, H/4 <------------- fuse, H/8 <-- fuse, H/16

Depth is here relative inverse depth: larger is nearer, and the scale and shift of each image are
unknown. Stable Diffusion 2's depth model was trained on what this network makes of its images.

Sources: Ranftl et al. 2021, https://arxiv.org/abs/2103.13413 (DPT); Ranftl et al. 2019,
https://arxiv.org/abs/1907.01341 (MiDaS); Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929
(ViT). Parameters have the names of transformers' DPTForDepthEstimation.

B batch, C channels, H W height and width of the image, h w those of a map, L tokens (1 + h*w)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import DPTConfig
from minisd.models.bit import ResNet
from minisd.models.ops import Ops

# Pixels along a token's side: the ResNet's stem divides by 4, its last two stages by 2.
PATCH = 16
# Not the 1e-12 that transformers has where a config.json is silent: MiDaS was trained with timm's.
NORM_EPS = 1e-6
HEAD_WIDTH = 32


def upsample() -> nn.Upsample:
    """Doubles height and width, bilinearly; the corner pixels stay in the corners."""
    return nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True)


class Embeddings(nn.Module):
    """The ResNet's features as tokens, row by row, after a learned class token; plus positions."""

    def __init__(self, config: DPTConfig, ops: Ops):
        super().__init__()
        width, self.side = config.hidden_size, config.image_size // PATCH
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + self.side**2, width))
        self.backbone = nn.ModuleDict({"bit": ResNet(config, ops)})
        self.projection = nn.Conv2d(config.hidden_sizes[-1], width, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The tokens, and the outputs of the first two stages."""
        *early, features = self.backbone["bit"](image)
        h = self.projection(features)                                        # (B, 768, h, w)
        tokens = h.flatten(2).transpose(1, 2)                                # (B, h*w, 768)
        first = self.cls_token.expand(len(tokens), -1, -1)                   # (B, 1, 768)
        tokens = torch.cat([first, tokens], dim=1)                           # (B, 1 + h*w, 768)
        return tokens + self.positions(*h.shape[-2:]), early

    def positions(self, h: int, w: int) -> Tensor:
        """The class token's, and a square of learned ones, bilinearly resized to (h, w)."""
        first, square = self.position_embeddings.split([1, self.side**2], dim=1)
        square = square.mT.unflatten(2, (self.side, self.side))              # (1, 768, 24, 24)
        resized = F.interpolate(square, (h, w), mode="bilinear")             # (1, 768, h, w)
        return torch.cat([first, resized.flatten(2).mT], dim=1)              # (1, 1 + h*w, 768)


class SelfAttention(nn.Module):
    """Every token attends to all of them."""

    def __init__(self, config: DPTConfig, ops: Ops):
        super().__init__()
        width, self.ops, self.heads = config.hidden_size, ops, config.num_attention_heads
        self.attention = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in self.attention.values())            # (B, L, C)
        return self.output["dense"](self.ops.attention(q, k, v, self.heads))


class Layer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DPTConfig, ops: Ops):
        super().__init__()
        width, self.ops = config.hidden_size, ops
        self.layernorm_before = nn.LayerNorm(width, NORM_EPS)
        self.attention = SelfAttention(config, ops)
        self.layernorm_after = nn.LayerNorm(width, NORM_EPS)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(config.intermediate_size, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ops.norm_tokens(self.layernorm_before, x))
        h = self.intermediate["dense"](self.ops.norm_tokens(self.layernorm_after, x))
        return x + self.output["dense"](F.gelu(h))


class Encoder(nn.Module):
    """The layers, one after the other. The outputs of two of them are returned."""

    def __init__(self, config: DPTConfig, ops: Ops):
        super().__init__()
        self.out_indices = config.out_indices
        self.layer = nn.ModuleList(Layer(config, ops) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.layer:
            x = layer(x)
            outputs.append(x)
        return [outputs[i] for i in self.out_indices]


class DPT(nn.Module):
    """An image -> two maps of the ResNet, and the tokens after two layers of the ViT."""

    def __init__(self, config: DPTConfig, ops: Ops):
        super().__init__()
        self.embeddings = Embeddings(config, ops)
        self.encoder = Encoder(config, ops)
        # In the official files and never used: the tokens are read before it.
        self.layernorm = nn.LayerNorm(config.hidden_size, NORM_EPS)

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        tokens, early = self.embeddings(image)
        return early, self.encoder(tokens)


class Project(nn.Module):
    """A 1x1 convolution; for the smallest map also one that halves height and width."""

    def __init__(self, width: int, halve: bool):
        super().__init__()
        self.projection = nn.Conv2d(width, width, 1)
        self.resize = nn.Conv2d(width, width, 3, stride=2, padding=1) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.projection(x))


class Reassemble(nn.Module):
    """Tokens -> maps. Each token is joined with the class token, which has seen all the others."""

    def __init__(self, width: int):
        super().__init__()
        early = [nn.Identity(), nn.Identity()]  # the ResNet's outputs are maps already
        late = (nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in range(2))
        self.readout_projects = nn.ModuleList([*early, *late])
        self.layers = nn.ModuleList([*early, Project(width, False), Project(width, True)])

    def forward(self, i: int, tokens: Tensor, h: int, w: int) -> Tensor:
        x = torch.cat([tokens[:, 1:], tokens[:, :1].expand(-1, h * w, -1)], dim=2)
        x = self.readout_projects[i](x)                                      # (B, h*w, C)
        return self.layers[i](x.mT.unflatten(2, (h, w)))


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.convolution2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class Fuse(nn.Module):
    """Adds a map to the smaller ones joined so far, and doubles the size."""

    def __init__(self, channels: int):
        super().__init__()
        self.residual_layer1 = ResidualUnit(channels)
        self.residual_layer2 = ResidualUnit(channels)
        self.upsample = upsample()
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        # The smallest map is x itself: its residual_layer1 is in the official files, and not used.
        x = x if skip is None else x + self.residual_layer1(skip)
        return self.projection(self.upsample(self.residual_layer2(x)))


class FusionStage(nn.Module):
    """Four maps (B, C, ...), the largest first -> one of twice the largest's size."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.ModuleList(Fuse(channels) for _ in range(4))

    def forward(self, maps: list[Tensor]) -> Tensor:
        *larger, smallest = maps
        x = self.layers[0](smallest)
        for layer, skip in zip(self.layers[1:], reversed(larger)):
            x = layer(x, skip)
        return x


class Neck(nn.Module):
    """Two maps of the ResNet, and two outputs of the ViT for an h by w map -> one map."""

    def __init__(self, config: DPTConfig):
        super().__init__()
        width, channels = config.hidden_size, config.fusion_hidden_size
        self.reassemble_stage = Reassemble(width)
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, channels, 3, padding=1, bias=False)
            for c_in in (*config.hidden_sizes[:2], width, width)
        )
        self.fusion_stage = FusionStage(channels)

    def forward(self, early: list[Tensor], late: list[Tensor], h: int, w: int) -> Tensor:
        maps = early + [self.reassemble_stage(2 + i, x, h, w) for i, x in enumerate(late)]
        return self.fusion_stage([conv(x) for conv, x in zip(self.convs, maps)])


class DepthEstimator(nn.Module):
    """The whole network.

    It takes any float dtype and any device, works in its own, and answers in the given.
    """

    def __init__(self, config: DPTConfig, ops: Ops):
        super().__init__()
        c = config.fusion_hidden_size
        self.dpt = DPT(config, ops)
        self.neck = Neck(config)
        self.head = nn.ModuleDict({"head": nn.Sequential(
            nn.Conv2d(c, c // 2, 3, padding=1), upsample(),
            nn.Conv2d(c // 2, HEAD_WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(HEAD_WIDTH, 1, 1), nn.ReLU(),
        )})

    def forward(self, image: Tensor) -> Tensor:
        """Relative inverse depth (B, H, W), 0 or more, of an image (B, 3, H, W) in [-1, 1].

        ValueError where a side is not a multiple of 32, a cell's side in the smallest map.
        """
        height, width = image.shape[2:]
        if height % (2 * PATCH) or width % (2 * PATCH):
            raise ValueError(
                f"the depth estimator reads sides of multiples of {2 * PATCH} pixels, not "
                f"{width}x{height}")
        x = image.to(self.dpt.embeddings.cls_token)                          # (B, 3, H, W)
        early, late = self.dpt(x)
        x = self.neck(early, late, height // PATCH, width // PATCH)          # (B, 256, H/2, W/2)
        return self.head["head"](x).squeeze(1).to(image)                     # (B, H, W)
