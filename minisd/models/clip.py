"""The text encoder: the only place where words become vectors.

A causal transformer reads 77 token ids and returns one vector per token. The UNet attends to all of
them, the padding too, because no mask was used when it was trained.

SD1 uses the text half of CLIP ViT-L/14 (Radford et al. 2021, https://arxiv.org/abs/2103.00020), SD2
that of OpenCLIP ViT-H/14 (Cherti et al. 2022, https://arxiv.org/abs/2212.07143) without its last
layer. Parameters carry the names of transformers' CLIPTextModel. CLIP's image tower,
clip_vision.py, has the same layers without the causal mask.

B batch, L tokens (77), D width
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import TextConfig, VisionConfig
from minisd.models.ops import Ops

NORM_EPS = 1e-5


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the approximation of GELU that OpenAI trained CLIP with.

    Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415. With the exact GELU in its place the
    model computes something else.
    """
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def table(rows: int, width: int) -> nn.Embedding:
    """An uninitialised vector for each of so many things."""
    # Not nn.Embedding(...): it would draw random numbers for two seconds, for nothing.
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Embeddings(nn.Module):
    """A vector for each token id plus a learned vector for each position."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = table(config.vocab_size, config.hidden_size)
        self.position_embedding = table(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        # The positions are 0..L-1 by definition; the position_ids in some files are damaged.
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Attention(nn.Module):
    """Self-attention over all tokens, or causal self-attention: over those up to its own."""

    def __init__(self, config: TextConfig | VisionConfig, ops: Ops, causal: bool):
        super().__init__()
        self.ops, self.heads, self.causal = ops, config.num_attention_heads, causal
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)             # (B, L, D)
        # By its name: the kernel's fifth argument is another one.
        return self.out_proj(self.ops.attention(q, k, v, self.heads, causal=self.causal))


class MLP(nn.Module):
    """Two linear layers with an activation between them; the hidden layer is four times as wide."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TextConfig | VisionConfig, ops: Ops, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, NORM_EPS)
        self.self_attn = Attention(config, ops, causal)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: TextConfig | VisionConfig, ops: Ops, causal: bool):
        super().__init__()
        layers = (Layer(config, ops, causal) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextEncoder(nn.Module):
    """Token ids (B, 77) on any device -> context (B, 77, D) there, after the final LayerNorm."""

    def __init__(self, config: TextConfig, ops: Ops):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, ops, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, NORM_EPS)

    def forward(self, ids: Tensor) -> Tensor:
        own = self.final_layer_norm.weight.device
        x = self.encoder(self.embeddings(ids.to(own)))                       # (B, L, D)
        return self.final_layer_norm(x).to(ids.device)                       # (B, L, D)
