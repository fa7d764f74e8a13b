"""The mean and standard deviation of CLIP's embeddings, for a single file of Stable unCLIP.

The original code has them, if at all, in a file of their own. That of minisd.save holds them.
"""

from dataclasses import replace
from pathlib import Path

from minisd.checkpoints import names_vision, parts
from minisd.checkpoints.folder import part_tensors
from minisd.checkpoints.found import Found, Group
from minisd.config import VIT_H, Config

PART = "image_normalizer"


def with_statistics(found: Found, given: Config | Path | None) -> Found:
    """A single file with what it lacks: with the statistics of the folder that was ``given``, if it
    has them; as it is for ViT-H/14, of which they are 0 and 1; else without the part, and with no
    noise above level 0."""
    (group,) = found.groups
    if PART not in group.rows or not names_vision.NORMALIZER.keys().isdisjoint(group.tensors):
        return found
    groups = [group._replace(rows={p: rows for p, rows in group.rows.items() if p != PART})]
    if isinstance(given, Path) and any((given / PART).glob("*.safetensors")):
        own = {PART: parts.folder(found.config)[PART]}
        groups.append(Group(part_tensors(given / PART, parts.OPTIONAL[PART].stem), own, {"": PART}))
    elif found.config.vision != VIT_H:
        bare = replace(found.config, normalizer_dim=None, max_noise_level=0)
        return found._replace(config=bare, groups=groups)
    return found._replace(groups=groups)
