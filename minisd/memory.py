"""How much memory a call will need at most, computed from the model's sizes before it begins.

Nearly all that a forward pass holds is proportional to positions times channels. So it is counted
in channels per position, at the widest moment of each part. This includes the copy that a
convolution makes of its input, in the memory order that the library wants.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

from minisd.config import Config, DPTConfig, UNetConfig
from minisd.depth_maps import prepared_size
from minisd.models.dpt import HEAD_WIDTH, PATCH
from minisd.models.vae import VAE
from minisd.request import Plan

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# What the files of a control group are called, in version 2 and in version 1 (cgroups(7)).
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
REMEDIES = ("choose a smaller size or fewer images at once, load with tile=64 (--tile 64), an "
            "upscaler with 128, or load with dtype float16 (--dtype float16) on a GPU")
# What torch and oneDNN say, beside the two types, when there is no memory left.
RAN_OUT = re.compile(
    r"can't allocate memory|out of memory|bad_alloc|could not create a (memory object|primitive$)")


def activations(
    config: Config, shape: tuple[int, ...], prompts: int, guided: bool, itemsize: int,
    tile: int | None = None, encodes: bool = False, decodes: bool = True,
    stores_scores: bool = False, vae_itemsize: int | None = None,
    estimates: tuple[int, int] | None = None,
) -> int:
    """Bytes that a call needs beside the weights, when it needs most.

    ``shape`` (B, 4, h, w) of the latents; ``itemsize`` bytes of a weight; ``tile`` as of the VAE;
    ``encodes``: an image is given; ``decodes``: one is wanted; ``stores_scores``: attention keeps
    all of q k^T, in float32, as only the reference does; ``vae_itemsize`` if the VAE's differs;
    ``estimates``: the sides in pixels of what the depth estimator reads, if it makes a map.
    """
    count, _, h, w = shape
    f, widths = config.vae.downscale, config.vae.block_out_channels
    pixels, scores = f * f * h * w, 8 * stores_scores  # q k^T and its softmax
    # The hidden layer, its activation in three steps, and as much in narrow tensors.
    text = prompts * itemsize * config.text.max_position_embeddings * 4 * (
        config.text.intermediate_size + config.text.hidden_size)

    if (tower := config.vision) is not None:  # one image at a time, see models/clip_vision.py
        tokens = 1 + (tower.image_size // tower.patch_size) ** 2
        text = max(text, itemsize * tokens * 4 * tower.intermediate_size,
                   scores * tower.num_attention_heads * tokens**2)

    part = h * w if tile is None else min(h, tile) * min(w, tile)
    seen = part if config.unet_in_tiles else h * w
    unet = count * (1 + guided) * (
        itemsize * _unet_channels(config.unet) * seen + scores * _unet_scores(config, seen))
    if seen < h * w:  # beside a tile: the whole inputs and predictions, each twice
        unet += count * (1 + guided) * 4 * h * w * 2 * (config.unet.in_channels + shape[1])

    depth = 0.0
    if config.depth is not None and estimates is not None:
        n = estimates[0] * estimates[1]
        depth = max(itemsize * _depth_channels(config.depth) * n,
                    scores * config.depth.num_attention_heads * (n / PATCH**2) ** 2)

    itemsize = vae_itemsize or itemsize
    # The wide input, its norm and the copy of that, and the narrow output of a convolution.
    decoder = max((3 * wide + c) / 4**i for i, (c, wide) in enumerate(_levels(widths)))
    vae = decodes * (itemsize * decoder * f * f * part + scores * part**2)
    if part < h * w:  # beside a tile: the image, and the sum of the fades
        vae += decodes * itemsize * 4 * pixels
    if encodes:  # one image, never in tiles: two inputs, h, its norm, the copy and the output
        vae = max(vae, itemsize * 6 * widths[0] * pixels + scores * (h * w) ** 2)
    images = decodes * count * 3 * 4 * pixels  # float32; three at a time as they turn to 8 bits
    return round(max(text, unet, depth, vae + images, 3 * images))


def _levels(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(width, width of the next smaller level) of each level, the largest first."""
    return list(zip(widths, (*widths[1:], widths[-1])))


def _unet_channels(config: UNetConfig) -> float:
    """Channels per position of the latent at the widest moment, which is on the way up."""
    most, skips = 0.0, 0.0
    for i, (c, wide) in enumerate(_levels(config.block_out_channels)):
        skips += config.layers_per_block * c / 4**i
        # A res block: its wide input, that and a skip, their norm and its copy, and the output.
        work = wide + 3 * (wide + c) + c
        if config.has_attention[i]:  # GEGLU: 8 wide, the gate and the product 4 each, 4 inputs
            work = max(work, wide + 20 * c)
        most = max(most, skips + work / 4**i)
        skips += c / 4**i
    return most


def _depth_channels(config: DPTConfig) -> float:
    """Channels per pixel of the estimator, which is widest in its head: half of the fused channels
    at full size, their copy and a convolution's output; its input and what the parts before left.
    """
    c, (wide, wider, _) = config.fusion_hidden_size, config.hidden_sizes
    left = c / 2**2 + wide / 4**2 + wider / 8**2 + 2 * config.hidden_size / PATCH**2
    return 2 * (c / 2) + HEAD_WIDTH + left


def _unet_scores(config: Config, positions: int) -> float:
    """The entries of the largest q k^T of an image, all heads together."""
    unet, tokens = config.unet, config.text.max_position_embeddings
    last, most = len(unet.num_heads) - 1, 0.0
    only_cross = unet.only_cross_attention or (False,) * len(unet.num_heads)
    levels = [*enumerate(zip(unet.num_heads, unet.has_attention, only_cross)),
              (last, (unet.num_heads[-1], True, False))]  # the middle
    for i, (heads, attends, only) in levels:
        queries = positions / 4**i
        most = max(most, attends * heads * queries * (tokens if only else queries))
    return most


def free(device: torch.device) -> int | None:
    """Bytes that the device could still give to this process; None where nobody says."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return None
    return min((room for room in (_of_machine(), _of_container(), _of_process())
                if room is not None), default=None)


def _of_machine() -> int | None:
    kib = _numbers(PROC / "meminfo", r"^(\w+): +(\d+) kB$")
    return 1024 * (kib["MemAvailable"] + kib.get("SwapFree", 0)) if "MemAvailable" in kib else None


def _of_container() -> int | None:
    """The least room in the control groups of this process, which a container is made of. Pages of
    files that nobody needs now count as free there, because the kernel takes them back."""
    rooms = []
    for controllers, path in re.findall(r"^\d+:(.*?):/(.*)$", _text(PROC / "self/cgroup"), re.M):
        if not (controllers == "" or "memory" in controllers.split(",")):
            continue
        root = CGROUPS / ("memory" if controllers else "")  # version 1 has a tree a controller
        limit, usage = LIMITS[bool(controllers)]
        # A limit of a group is one of all groups inside it.
        for group in (root / path, *(root / path).parents):
            if (most := _text(group / limit).strip()).isdigit():
                stat = _numbers(group / "memory.stat", r"^(\w+) (\d+)$")
                files = stat.get("total_inactive_file", stat.get("inactive_file", 0))
                rooms.append(int(most) - int(_text(group / usage) or 0) + files)
            if group == root:
                break
    return max(0, min(rooms)) if rooms else None


def _of_process() -> int | None:
    """What `ulimit -v` leaves of the address space."""
    if resource is None:  # on Windows
        return None
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    size = _numbers(PROC / "self/status", r"^(VmSize):\s+(\d+) kB$")
    if most == resource.RLIM_INFINITY or not size:
        return None
    return max(0, most - 1024 * size["VmSize"])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _numbers(path: Path, row: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(row, _text(path), re.MULTILINE)}


def check(
    r: Plan, dtype: torch.dtype, device: torch.device, vae: VAE, encodes: bool, decodes: bool,
    stores_scores: bool,
) -> None:
    """Raise MemoryError, before the attempt, for a request that cannot fit.

    ``dtype`` and ``device`` are those of the UNet; the rest is as for `activations`.
    """
    need = activations(
        r.config, r.shape, len(r.generators) // r.num_images_per_prompt, r.guided,
        dtype.itemsize, vae.tile, encodes, decodes, stores_scores,
        vae.quant_conv.weight.itemsize,
        prepared_size(*r.image.size) if r.image is not None and r.depth_map is None else None)
    there = free(device)
    if there is not None and need > there:
        raise MemoryError(
            f"{len(r.generators)} of {r.width}x{r.height} pixels at once needs about "
            f"{need / 2**30:.1f} GiB beside the weights, and {device} has "
            f"{there / 2**30:.1f} GiB free: {REMEDIES}")


@contextmanager
def explained() -> Iterator[None]:
    """Turn whatever says that memory ran out into one MemoryError with what to do about it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        typed = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if REMEDIES in text or not (typed or RAN_OUT.search(text)):
            raise
        raise MemoryError(f"{text or 'out of memory'}: {REMEDIES}") from error
