"""The whole of Stable Diffusion once more, in NumPy alone: one file, read from top to bottom.

    prompt --ids--> (77) --text_encoder--> context (77, D) --.
                                                             v
    seed --noise--> x_T --> [ unet: without and with the prompt; guidance; DDIM step ] x 50 --> x_0
                                                                                                 |
    image (H, W, 3) <---------------------------------- decode ----------------------------------'

    python -m minisd.numpy_sd "a red heart on a blue background" -o heart.png --seed 3

The other files of minisd compute the same with torch and say more of why each part is as it is; the
tests compare the two in float64 (tests/pipeline/test_numpy_sd.py). Every number that training found
lies in a dictionary ``p`` under its official name: down_blocks.0.resnets.1.conv1.weight is
``p["down_blocks"][0]["resnets"][1]["conv1"]["weight"]``. So how many blocks there are is read from
the weights; what no weight tells (heads, groups of a norm, the schedule) is in config.py.

On two cores this command takes 2 s. A call of SD1.5's UNet at 512x512, without and with the prompt,
took about a minute there (random weights; 1.6 TFLOP and 5 GB of memory), so that an official image
takes an hour: that is what torch and a GPU are for.

B batch, L tokens, D width of the context, C channels, h w height and width of the latent at a level
(h = H/8, officially), H heads, d channels per head
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from minisd import files
from minisd.checkpoints import names
from minisd.checkpoints.diffusers_config import read_config
from minisd.config import PREDICTION_TYPES, SD1, SD2, SD2_V, Config
from minisd.errors import WeightError, warn
from minisd.progress import counted
from minisd.text import bpe

Array = np.ndarray
Tree = dict[Any, Any]  # a piece of a parameter's name -> the tree below it, or the parameter


class Model(NamedTuple):
    """What was learned, and the few numbers that no weight tells."""

    config: Config
    vocab: dict[str, int]      # symbol -> id
    merges: bpe.Merges
    text_encoder: Tree
    unet: Tree
    vae: Tree


# --- 1. The whole way -----------------------------------------------------------------------------


def draw(model: Model, prompt: str, steps: int = 50, guidance: float = 7.5, seed: int = 0) -> Array:
    """The image of a prompt: (H, W, 3), values in [0, 1]."""
    config = model.config
    abar = alphas_cumprod(config)
    visited = timesteps(steps, len(abar))
    # Text -> context. The empty prompt too: guidance compares the two.
    context = text_encoder(model.text_encoder, config, ids(model, ["", prompt]))  # (2, 77, D)
    # Pure noise x_T, of the latent's size.
    side = config.sample_size // config.vae.downscale
    x = noise(seed, (1, config.vae.latent_channels, side, side)).astype(context.dtype)
    # Denoise, from the noisiest timestep to 0.
    for t in counted(visited, None):
        both = unet(model.unet, config, np.repeat(x, 2, axis=0), t, context)  # (2, 4, h, w)
        uncond, cond = both[:1], both[1:]                                    # (1, 4, h, w)
        # Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6):
        # from what is seen without the prompt towards what is seen with it, and further.
        prediction = uncond + guidance * (cond - uncond)                     # (1, 4, h, w)
        after = abar[max(t + visited.step, 0)]  # of the next timestep: less noise
        x = finite(ddim_step(x, prediction, abar[t], after, config.schedule.prediction_type))
    # Latent -> pixels.
    image = finite(decode(model.vae, config, x)[0]).transpose(1, 2, 0)       # (H, W, 3)
    return (image / 2 + 0.5).clip(0, 1)                                      # (H, W, 3)


def finite(x: Array) -> Array:
    """x itself. A value that is infinite, or no number, would spread to all others."""
    if not np.isfinite(x).all():
        raise ArithmeticError("the values are not finite: a smaller --guidance, or other weights")
    return x


# --- 2. Text -> ids -> context --------------------------------------------------------------------


def ids(model: Model, prompts: list[str]) -> Array:
    """The ids of each prompt; text/bpe.py tells how."""
    ranks = {pair: rank for rank, pair in enumerate(model.merges)}
    rows = [bpe.encode(prompt, model.vocab, ranks) for prompt in prompts]
    room = bpe.LENGTH - 2
    if (most := max(map(len, rows))) > room:
        warn(f"the prompt is {most} tokens long and the model reads {room}: the rest is dropped")
    # SD1 fills up with the end token; SD2's encoder, OpenCLIP's, was trained with 0.
    pad = 0 if model.config.text.hidden_act == "gelu" else model.vocab[bpe.EOS]
    return np.array([bpe.frame(row, model.vocab, pad) for row in rows])      # (B, 77)


def text_encoder(p: Tree, config: Config, ids: Array) -> Array:
    """A vector for each token, which knows the tokens before it: a causal transformer, CLIP's
    (Radford et al. 2021, https://arxiv.org/abs/2103.00020). ids (B, L) -> context (B, L, D)."""
    table, position = (p["embeddings"][f"{name}_embedding"] for name in ("token", "position"))
    x = table["weight"][ids] + position["weight"][: ids.shape[1]]            # (B, L, D)
    activation = {"quick_gelu": quick_gelu, "gelu": gelu}[config.text.hidden_act]
    for layer in p["encoder"]["layers"].values():
        attn, mlp = layer["self_attn"], layer["mlp"]
        h = layer_norm(layer["layer_norm1"], x)
        q, k, v = (linear(attn[f"{name}_proj"], h) for name in "qkv")
        h = attention(q, k, v, config.text.num_attention_heads, causal=True)
        x = x + linear(attn["out_proj"], h)
        h = activation(linear(mlp["fc1"], layer_norm(layer["layer_norm2"], x)))
        x = x + linear(mlp["fc2"], h)
    return layer_norm(p["final_layer_norm"], x)                              # (B, L, D)


# --- 3. Seed -> noise -----------------------------------------------------------------------------


def noise(seed: int, shape: tuple[int, ...]) -> Array:
    """N(0, I) as torch.randn draws it on a CPU, in float32: a seed means these very numbers.

    Both begin with the same random words (Mersenne Twister). Box & Muller 1958 make two normal
    numbers of two uniform ones, here in blocks of 16: 8 give the radii, and 8 the angles.
    """
    n = math.prod(shape)
    rest = n % 16  # if there is one, torch draws the last 16 numbers anew
    words = np.random.RandomState(seed).randint(0, 2**32, n + 16 * (rest > 0), np.uint32)
    uniform = (words & 0xFFFFFF).astype(np.float32) / 2**24                  # (n or n+16)
    blocks = np.r_[uniform[: n - rest], uniform[n:]].reshape(-1, 2, 8)       # (n/16, 2, 8)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, 0]))                          # (n/16, 8)
    angle = 2 * np.float32(np.pi) * blocks[:, 1]                             # (n/16, 8)
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return np.r_[normal[: n - 16], normal[-16:]].reshape(shape)


# --- 4. The UNet: which noise is in x? ------------------------------------------------------------


def unet(p: Tree, config: Config, x: Array, t: int, context: Array) -> Array:
    """The noise in x (B, 4, h, w) at timestep t, given the context (B, L, D): (B, 4, h, w).

    It was trained to minimise E || eps - eps_theta(x_t, t, c) ||^2 (Rombach et al. 2022,
    https://arxiv.org/abs/2112.10752, eq. 3); some models predict v instead, see ddim_step. Down to
    the smallest size and up again: each output on the way down is kept, and is concatenated to an
    input on the way up (skip connections).
    """
    groups, mlp = config.unet.norm_num_groups, p["time_embedding"]
    emb = timestep_embedding(t, config.unet.block_out_channels[0]).astype(x.dtype)
    emb = linear(mlp["linear_2"], silu(linear(mlp["linear_1"], emb)))        # (1, 4C)

    def layer(block: Tree, i: int, x: Array, heads: int) -> Array:
        x = res_block(block["resnets"][i], x, groups, 1e-5, emb)
        if "attentions" in block:
            x = spatial_transformer(block["attentions"][i], x, context, groups, heads)
        return x

    x = conv(p["conv_in"], x)                                                # (B, C, h, w)
    skips = [x]
    for block, heads in zip(p["down_blocks"].values(), config.unet.num_heads):
        for i in block["resnets"]:
            x = layer(block, i, x, heads)
            skips.append(x)
        if "downsamplers" in block:
            x = conv(block["downsamplers"][0]["conv"], x, stride=2)
            skips.append(x)

    middle = p["mid_block"]
    x = layer(middle, 0, x, config.unet.num_heads[-1])
    x = res_block(middle["resnets"][1], x, groups, 1e-5, emb)

    for block, heads in zip(p["up_blocks"].values(), reversed(config.unet.num_heads)):
        for i in block["resnets"]:
            x = np.concatenate([x, skips.pop()], axis=1)
            x = layer(block, i, x, heads)
        if "upsamplers" in block:
            x = conv(block["upsamplers"][0]["conv"], doubled(x))
    x = silu(group_norm(p["conv_norm_out"], x, groups, 1e-5))
    return conv(p["conv_out"], x)                                            # (B, 4, h, w)


def timestep_embedding(t: int, width: int) -> Array:
    """[cos(t w_i), sin(t w_i)], w_i = 10000^(-i/half), as float32 (Vaswani et al., section 3.5)."""
    half = width // 2
    angles = t * np.exp(np.arange(half, dtype=np.float32) * -math.log(10000) / half)
    return np.concatenate([np.cos(angles), np.sin(angles)])[None]            # (1, width)


def res_block(p: Tree, x: Array, groups: int, eps: float, emb: Array | None = None) -> Array:
    """Two convolutions added to their input; between them the timestep is added (in the UNet)."""
    h = conv(p["conv1"], silu(group_norm(p["norm1"], x, groups, eps)))       # (B, C, h, w)
    if emb is not None:
        h = h + linear(p["time_emb_proj"], silu(emb))[:, :, None, None]
    h = conv(p["conv2"], silu(group_norm(p["norm2"], h, groups, eps)))       # (B, C, h, w)
    return h + (conv(p["conv_shortcut"], x) if "conv_shortcut" in p else x)


def spatial_transformer(p: Tree, x: Array, context: Array, groups: int, heads: int) -> Array:
    """Each position is a token: it attends to the others, then to the words; then an MLP."""
    block = p["transformer_blocks"][0]

    def attend(attn: Tree, h: Array, seen: Array) -> Array:
        q, k, v = (linear(attn[f"to_{name}"], x) for name, x in zip("qkv", (h, seen, seen)))
        return linear(attn["to_out"][0], attention(q, k, v, heads))

    # 1e-6 here and in the decoder, 1e-5 in the UNet's res blocks: both are as in training.
    h = linear(p["proj_in"], as_tokens(group_norm(p["norm"], x, groups, 1e-6)))  # (B, h*w, C)
    own = layer_norm(block["norm1"], h)
    h = h + attend(block["attn1"], own, own)                                 # self-attention
    h = h + attend(block["attn2"], layer_norm(block["norm2"], h), context)   # cross-attention
    # GEGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): one half gates the other.
    wide = linear(block["ff"]["net"][0]["proj"], layer_norm(block["norm3"], h))  # (B, h*w, 8C)
    value, gate = np.split(wide, 2, axis=-1)                                 # (B, h*w, 4C)
    h = h + linear(block["ff"]["net"][2], value * gelu(gate))                # (B, h*w, C)
    return x + as_pixels(linear(p["proj_out"], h), x)                        # (B, C, h, w)


# --- 5. The schedule and a step -------------------------------------------------------------------


def alphas_cumprod(config: Config) -> list[float]:
    """abar_t: training mixed x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239, eq. 4), abar_t = prod (1 - beta_s) over s = 0 .. t."""
    low, high = config.schedule.beta_start**0.5, config.schedule.beta_end**0.5
    roots = np.linspace(low, high, config.schedule.num_train_timesteps)
    return np.cumprod(1 - roots**2).tolist()


def timesteps(steps: int, trained: int) -> range:
    """Which timesteps are visited: "leading", 981, 961 .. 1 for 50 steps of 1000."""
    if not 1 <= steps <= trained:
        raise ValueError(f"--steps must be from 1 to {trained}, not {steps}")
    stride, offset = trained // steps, int(steps < trained)
    return range((steps - 1) * stride + offset, offset - 1, -stride)


def ddim_step(x: Array, prediction: Array, abar: float, after: float, kind: str) -> Array:
    """Guess x_0 and eps, and mix them again with less noise (Song et al. 2020, DDIM,
    https://arxiv.org/abs/2010.02502, eq. 12 with sigma = 0)."""
    if kind == "v_prediction":  # v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022)
        x0 = abar**0.5 * x - (1 - abar) ** 0.5 * prediction
        eps = abar**0.5 * prediction + (1 - abar) ** 0.5 * x
    else:
        x0 = (x - (1 - abar) ** 0.5 * prediction) / abar**0.5
        eps = prediction
    return after**0.5 * x0 + (1 - after) ** 0.5 * eps


# --- 6. The decoder: latent -> pixels -------------------------------------------------------------


def decode(p: Tree, config: Config, x: Array) -> Array:
    """Latents (B, 4, h, w) -> images (B, 3, H, W), about [-1, 1]: the VAE's second half."""
    decoder, groups = p["decoder"], config.vae.norm_num_groups
    x = conv(p["post_quant_conv"], x / config.vae.scaling_factor)            # (B, 4, h, w)
    x = conv(decoder["conv_in"], x)                                          # (B, C, h, w)
    middle = decoder["mid_block"]
    x = res_block(middle["resnets"][0], x, groups, 1e-6)
    x = self_attention(middle["attentions"][0], x, groups)
    x = res_block(middle["resnets"][1], x, groups, 1e-6)
    for block in decoder["up_blocks"].values():
        for resnet in block["resnets"].values():
            x = res_block(resnet, x, groups, 1e-6)
        if "upsamplers" in block:
            x = conv(block["upsamplers"][0]["conv"], doubled(x))
    x = silu(group_norm(decoder["conv_norm_out"], x, groups, 1e-6))
    return conv(decoder["conv_out"], x)                                      # (B, 3, H, W)


def self_attention(p: Tree, x: Array, groups: int) -> Array:
    """One head over all positions, so that distant parts of the image agree."""
    h = as_tokens(group_norm(p["group_norm"], x, groups, 1e-6))              # (B, h*w, C)
    q, k, v = (linear(p[f"to_{name}"], h) for name in "qkv")                 # (B, h*w, C)
    return x + as_pixels(linear(p["to_out"][0], attention(q, k, v, 1)), x)


# --- 7. The layers that all of them are made of ---------------------------------------------------


def linear(p: Tree, x: Array) -> Array:
    """x W^T + b over the last axis. SD1 stores some of these W as convolutions of 1x1."""
    y = x @ p["weight"].reshape(len(p["weight"]), -1).T
    return y + p["bias"] if "bias" in p else y


def conv(p: Tree, x: Array, stride: int = 1) -> Array:
    """y[o, i, j] = b[o] + sum over c, m, n of W[o, c, m, n] x[c, i + m - 1, j + n - 1].

    As one product of matrices: each column holds what one position sees (im2col).
    """
    (c_out, _, size, _), edge = p["weight"].shape, p["weight"].shape[-1] // 2
    x = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))              # zeros around
    seen = sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
    seen = seen.transpose(0, 1, 4, 5, 2, 3)                                  # (B, C, k, k, h, w)
    b, c, _, _, h, w = seen.shape
    columns = seen.reshape(b, c * size * size, h * w)
    y = p["weight"].reshape(c_out, -1) @ columns + p["bias"][:, None]
    return y.reshape(b, c_out, h, w)


def group_norm(p: Tree, x: Array, groups: int, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias, over each of ``groups`` runs of channels
    (Wu & He 2018, https://arxiv.org/abs/1803.08494)."""
    y = _normalised(x.reshape(len(x), groups, -1), eps).reshape(x.shape)
    return y * p["weight"][:, None, None] + p["bias"][:, None, None]


def layer_norm(p: Tree, x: Array) -> Array:
    """The same over the channels of each token (Ba et al. 2016, https://arxiv.org/abs/1607.06450).
    """
    return _normalised(x, 1e-5) * p["weight"] + p["bias"]


def _normalised(x: Array, eps: float) -> Array:
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def attention(q: Array, k: Array, v: Array, heads: int, causal: bool = False) -> Array:
    """softmax(q k^T / sqrt(d)) v for each head (Vaswani et al. 2017, "Attention Is All You Need",
    https://arxiv.org/abs/1706.03762, eq. 1); ``causal`` hides later tokens."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in (q, k, v))
    scores = q / q.shape[-1] ** 0.5 @ k.swapaxes(2, 3)                       # (B, H, Lq, Lk)
    if causal:
        scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    # exp() of a large score would overflow, so the largest is subtracted, which changes no weight.
    # In place, because the scores of 64x64 positions take 1 GB.
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores, out=scores)
    y = weights @ v / weights.sum(axis=-1, keepdims=True)                    # (B, H, Lq, d)
    return y.swapaxes(1, 2).reshape(len(y), y.shape[2], -1)                  # (B, Lq, H*d)


def sigmoid(x: Array) -> Array:
    return (1 + np.tanh(x / 2)) / 2  # 1 / (1 + exp(-x)), which could overflow


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation, with which CLIP was trained."""
    return x * sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """x times the share of N(0, 1) below x (Hendrycks & Gimpel 2016,
    https://arxiv.org/abs/1606.08415). NumPy has no erf: this calls Python's for each number."""
    erf = np.vectorize(math.erf, otypes=[x.dtype])
    return x * (1 + erf(x / 2**0.5)) / 2


def as_tokens(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)                        # (B, h*w, C)


def as_pixels(tokens: Array, like: Array) -> Array:
    return tokens.swapaxes(1, 2).reshape(like.shape)                         # (B, C, h, w)


def doubled(x: Array) -> Array:
    """Each value four times: nearest neighbour."""
    return x.repeat(2, axis=2).repeat(2, axis=3)                             # (B, C, 2h, 2w)


# --- 8. Files -> weights --------------------------------------------------------------------------


def load(path: Path, prediction_type: str | None = None) -> Model:
    """A folder in diffusers layout, or a single .safetensors file in the original one."""
    if path.is_dir():
        config = read_config(path)
        rows = names.folder(config)
        stored = {part: read_all((path / part).glob("*.safetensors")) for part in rows}
    else:
        tensors = read_safetensors(path)
        config = recognise(path, tensors, prediction_type)
        rows = names.single_file(config)
        stored = dict.fromkeys(rows, tensors)
    if prediction_type:
        schedule = replace(config.schedule, prediction_type=prediction_type)
        config = replace(config, schedule=schedule)
    text, unet, vae = (tree(renamed(stored[part], rows[part])) for part in names.PARTS)
    told = "class_embedding" in unet or "cond_proj" in unet["time_embedding"]
    sees = unet["conv_in"]["weight"].shape[1] > config.vae.latent_channels
    own = config.schedule.timestep_spacing == "trailing" or config.schedule.rescale_betas_zero_snr
    if told or sees or own:
        raise WeightError(f"{path} is for inpainting, for few steps, of zero terminal SNR or told "
                          "more than a prompt: that takes the minisd command")
    return Model(config, *read_vocabulary(path / "tokenizer"), text, unet, vae)


def read_all(paths: Iterable[Path]) -> dict[str, Array]:
    """The tensors of some files, which may be shards; of two with one name, the last."""
    found = (read_safetensors(path).items() for path in sorted(paths))
    return {name: tensor for items in found for name, tensor in items}


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a file, by name (https://github.com/huggingface/safetensors).

    It begins with 8 bytes that give the length of a header in JSON, which tells the dtype, shape
    and place of each tensor; after it come their values.
    """
    try:
        data = np.asarray(np.memmap(path, np.uint8, "r"))  # mapped: read where it is needed
        end = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:end].tobytes())
        header.pop("__metadata__", None)
        return {name: _values(data[end:], **entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise WeightError(f"{path} is not a safetensors file that is whole: {error}") from None


def _values(data: Array, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
    raw = data[slice(*data_offsets)]
    if dtype == "BF16":  # the first half of a float32
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return raw.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).reshape(shape)


def renamed(tensors: dict[str, Array], rows: names.NameMap) -> dict[str, Array]:
    """Under the official names of diffusers, in float32; what no image needs is left out."""
    return {parameter: piece.astype(np.float32, copy=False)
            for name, parameters in rows.items() if name in tensors
            # OpenCLIP stacks the weights of q, k and v.
            for parameter, piece in zip(parameters, np.split(tensors[name], len(parameters)))}


def tree(parameters: dict[str, Array]) -> Tree:
    """{"conv1.weight": w} -> {"conv1": {"weight": w}}; numbers in names become ints, in order."""
    paths = {name: [int(x) if x.isdigit() else x for x in name.split(".")] for name in parameters}
    root: Tree = {}
    for name in sorted(parameters, key=paths.__getitem__):
        *above, last = paths[name]
        node = root
        for step in above:
            node = node.setdefault(step, {})
        node[last] = parameters[name]
    return root


def recognise(path: Path, tensors: dict[str, Array], prediction_type: str | None) -> Config:
    """Stable Diffusion 1 or 2, by the width of the context; no tensor tells what 2 predicts."""
    to_k = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    rows = names.single_file(SD1)["unet"].items()
    width = next((tensors[name].shape[-1] for name, (parameter,) in rows
                  if parameter == to_k and name in tensors), None)
    if width == SD1.unet.cross_attention_dim:
        return SD1
    if width != SD2.unet.cross_attention_dim:
        raise WeightError(f"{path} is no Stable Diffusion 1 or 2")
    if prediction_type is None:
        raise ValueError(f"{path} is a Stable Diffusion 2: give --prediction-type, epsilon for the "
                         "model of 512 pixels, v_prediction for that of 768")
    return SD2_V if prediction_type == "v_prediction" else SD2


def read_vocabulary(folder: Path) -> tuple[dict[str, int], bpe.Merges]:
    """A folder's own, or CLIP's."""
    if not (folder / "vocab.json").is_file():
        merges = bpe.clip_merges()
        return bpe.clip_vocabulary(merges), merges
    merges = bpe.parse_merges((folder / "merges.txt").read_text("utf-8"))
    return json.loads((folder / "vocab.json").read_text("utf-8")), merges


# --- 9. The command line --------------------------------------------------------------------------

EXIT_CODES = {WeightError: 3, FileNotFoundError: 3, KeyError: 3, OSError: 5, Exception: 2}


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code; None means ``sys.argv``."""
    parser = argparse.ArgumentParser(
        "python -m minisd.numpy_sd", description="Stable Diffusion in NumPy: a prompt to a PNG.")
    option = parser.add_argument
    option("prompt", help="what to draw, in quotes")
    option("-m", "--model", type=Path, default=str(resources.files("minisd_weights") / "tiny"),
           help="a folder in diffusers layout, or a .safetensors file (default: the shipped model)")
    option("--prediction-type", choices=PREDICTION_TYPES, help="whatever the model's files say")
    option("-o", "--output", default="numpy_sd.png", help="a PNG (default: %(default)s)")
    option("--overwrite", action="store_true", help="replace an existing file")
    option("--steps", type=int, default=50, help="1 to 1000 (default: %(default)s)")
    option("--guidance", type=float, default=7.5, help="1 is off (default: %(default)s)")
    option("--seed", type=int, default=0, help="0 to 4294967295 (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if not args.output.lower().endswith(".png"):
            raise ValueError(f"-o {args.output}: the name must end in .png")
        files.check_writable(args.output, args.overwrite)
        model = load(args.model, args.prediction_type)
        image = draw(model, args.prompt, args.steps, args.guidance, args.seed)
        with files.new_file(args.output, args.overwrite) as file:
            Image.fromarray((255 * image).round().astype(np.uint8)).save(file, "PNG")
    except (OSError, ValueError, ArithmeticError, KeyError) as error:
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        lacks = f"{args.model} lacks the tensors of " if isinstance(error, KeyError) else ""
        sys.stderr.write(f"{parser.prog}: error: {lacks}{error}\n")
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
