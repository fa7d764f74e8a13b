"""The ResNet under the depth estimator: the only place where it sees pixels.

A ResNet-50 without its last stage, in the version of "Big Transfer": GroupNorm instead of batch
norm, and standardised weights. Its last output becomes the tokens of the transformer in dpt.py.

Source: Kolesnikov et al. 2019, https://arxiv.org/abs/1912.11370 (BiT); timm's
vit_base_resnet50_384, on which MiDaS is built. Parameters have the names of transformers.

B batch, H W height and width of the image
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import DPTConfig
from minisd.models.ops import Ops

NORM_EPS = 1e-5
WEIGHT_EPS = 1e-8


def pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's "same" padding with zeros: with an odd sum, one more at the right and below.

    The sum is max((ceil(n / stride) - 1) stride + kernel - n, 0) for a side n, which the stride
    divides here.
    """
    total = max(kernel - stride, 0)
    before, after = total // 2, total - total // 2
    return F.pad(x, (before, after, before, after))


class StandardizedConv(nn.Conv2d):
    """A convolution without bias, with weight standardization: (w - mean) / sqrt(var + eps).

    Mean and variance are those of the weights of one output channel. Qiao et al. 2019,
    https://arxiv.org/abs/1903.10520. The padding is TensorFlow's, from which BiT comes.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__(c_in, c_out, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # A LayerNorm without scale and shift is the formula above, also in half precision.
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=WEIGHT_EPS)
        return F.conv2d(pad(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class Stem(nn.Module):
    """A convolution and a pooling that each halve height and width."""

    def __init__(self, config: DPTConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.convolution = StandardizedConv(3, config.embedding_size, 7, stride=2)
        self.norm = nn.GroupNorm(config.norm_num_groups, config.embedding_size, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.ops.norm(self.norm, self.convolution(x)))            # (B, 64, H/2, W/2)
        # Padding with zeros is that with minus infinity, because after ReLU nothing is below 0.
        return F.max_pool2d(pad(h, 3, 2), 3, 2)                              # (B, 64, H/4, W/4)


class Shortcut(nn.Module):
    """What a block adds to its result where the channels change: a 1x1 convolution and a norm."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int, ops: Ops):
        super().__init__()
        self.ops = ops
        self.conv = StandardizedConv(c_in, c_out, 1, stride)
        self.norm = nn.GroupNorm(groups, c_out, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.norm(self.norm, self.conv(x))


class Bottleneck(nn.Module):
    """A residual block: 1x1 to a quarter of the channels, 3x3 with the stride, 1x1 back.

    Each norm follows its convolution, and a ReLU ends the block: not as in BiT, where they precede.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int, ops: Ops):
        super().__init__()
        self.ops, middle = ops, c_out // 4
        changes = c_in != c_out
        self.downsample = Shortcut(c_in, c_out, stride, groups, ops) if changes else nn.Identity()
        self.conv1 = StandardizedConv(c_in, middle, 1)
        self.norm1 = nn.GroupNorm(groups, middle, NORM_EPS)
        self.conv2 = StandardizedConv(middle, middle, 3, stride)
        self.norm2 = nn.GroupNorm(groups, middle, NORM_EPS)
        self.conv3 = StandardizedConv(middle, c_out, 1)
        self.norm3 = nn.GroupNorm(groups, c_out, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.ops.norm
        h = F.relu(norm(self.norm1, self.conv1(x)))
        h = F.relu(norm(self.norm2, self.conv2(h)))
        h = norm(self.norm3, self.conv3(h))
        return F.relu(h + self.downsample(x))


class Stage(nn.Module):
    """Some blocks, of which the first changes the channels and has the stride."""

    def __init__(self, c_in: int, c_out: int, depth: int, stride: int, groups: int, ops: Ops):
        super().__init__()
        first = Bottleneck(c_in, c_out, stride, groups, ops)
        others = (Bottleneck(c_out, c_out, 1, groups, ops) for _ in range(depth - 1))
        self.layers = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Stages(nn.Module):
    """Every stage but the first halves height and width. All outputs are returned."""

    def __init__(self, config: DPTConfig, ops: Ops):
        super().__init__()
        widths, groups = (config.embedding_size, *config.hidden_sizes), config.norm_num_groups
        self.stages = nn.ModuleList(
            Stage(widths[i], widths[i + 1], depth, 1 if i == 0 else 2, groups, ops)
            for i, depth in enumerate(config.depths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class ResNet(nn.Module):
    """An image -> the outputs of the three stages."""

    def __init__(self, config: DPTConfig, ops: Ops):
        super().__init__()
        self.embedder = Stem(config, ops)
        self.encoder = Stages(config, ops)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.encoder(self.embedder(image))
