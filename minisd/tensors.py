"""The tensors that a call is given: right, or one TypeError or ValueError before any work."""

from torch import Tensor

from minisd.config import Config
from minisd.depth_maps import open_depth_map


def embeddings(name: str, value: object, shape: tuple[int, ...],
               what: str = "prompts") -> int | None:
    """How many prompts, or what else, the embeddings are of; None without any."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor")
    if value.shape[1:] != shape or len(value) == 0:
        raise ValueError(f"{name} must be ({what}, {', '.join(map(str, shape))}), "
                         f"not {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite")
    return len(value)


def depth_maps(value: object, count: int, images: int) -> Tensor | None:
    """Depth maps (1 or B, H, W), for B images of so many prompts."""
    if value is None:
        return None
    maps = open_depth_map(value)  # type: ignore[arg-type]
    return one_each("depth maps", maps, count, images)


def image_embeds(value: object, config: Config) -> Tensor | None:
    """Embeddings of images (n, D); one may be given as (D,)."""
    if value is None or config.vision is None:
        return None
    value = value[None] if isinstance(value, Tensor) and value.dim() == 1 else value
    embeddings("image_embeds", value, (config.vision.projection_dim,), "images")
    return value  # type: ignore[return-value]


def one_each(name: str, rows: Tensor | None, count: int, images: int) -> Tensor | None:
    """Rows, of which there is one for all or for each of ``count`` prompts or ``images`` -> one for
    all or for each image."""
    if rows is None or len(rows) == 1:
        return rows
    if len(rows) not in (count, images):
        raise ValueError(f"there are {images} images but {len(rows)} {name}: "
                         "give one for all, or one for each prompt or image")
    return rows.repeat_interleave(images // len(rows), dim=0)


def latents_of(value: object, shape: tuple[int, ...]) -> Tensor:
    """The latents, if they are finite floats of that shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"latents must be a tensor, not {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"latents must be {shape}, not {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"latents must be of a floating-point dtype, not {value.dtype}")
    if not value.isfinite().all():
        raise ValueError("latents hold values that are not finite")
    return value


def changed_latents(changes: object, latents: Tensor) -> Tensor:
    """What a callback returned, applied: None changes nothing, a dict may hold other latents."""
    if changes is not None and not isinstance(changes, dict):
        raise TypeError(f"a callback must return a dict or None, not {type(changes).__name__}")
    if not changes or "latents" not in changes:
        return latents
    return latents_of(changes["latents"], tuple(latents.shape)).to(latents)
