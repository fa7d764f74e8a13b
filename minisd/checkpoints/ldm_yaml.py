"""The YAML beside a single file: the config that CompVis' and Stability's own code builds it from.

Of ``m.safetensors`` it is ``m.yaml``. Others wrote it, so nothing in it becomes an object: what is
read are mappings, lists and text, from the parser's events, within bounds. A file without a
``model`` that has ``params`` is no such config (a web page that was saved in its place, an empty
file) and an error by its name. If it counted as one that says nothing, the model would be taken for
one that predicts eps.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from minisd.config import Config
from minisd.errors import WeightError

MAX_BYTES = 128 * 2**10  # the official ones have 2 kB,
MAX_DEPTH = 32           # 8 levels
MAX_EVENTS = 20_000      # and 200 keys and values

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
# Stability's later code, sgm, names a class where LDM has one of these words.
SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}
REMEDY = "take it away, or give prediction_type= (--prediction-type)"

Tree = str | list | dict


def read_params(path: Path) -> dict[str, Tree]:
    """``model.params`` of the file, all of its scalars as text.

    WeightError, one sentence that names the file, where there is none.
    """
    if path.stat().st_size > MAX_BYTES:
        raise WeightError(f"{path} is too large for a config (over {MAX_BYTES} bytes); {REMEDY}")
    try:
        tree = _document(path.read_bytes())
    # PyYAML has an error of its own, and lets through those of int() and chr().
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise WeightError(f"{path} is no YAML that minisd reads: {_reason(error)}; "
                          f"{REMEDY}") from None
    model = tree.get("model") if isinstance(tree, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    if not isinstance(params, dict):
        raise WeightError(f"{path} is no config of a model (it has no model with params); {REMEDY}")
    return params


def prediction_of(path: Path, params: dict[str, Tree]) -> str:
    """The prediction type that the params of ``path`` give, in diffusers' words."""
    word = params.get("parameterization")
    if word is None and "denoiser_config" in params:
        word = _scaling(params["denoiser_config"])
    word = "eps" if word is None else word  # what LDM's code does without it
    if not isinstance(word, str) or word not in PREDICTIONS:
        raise WeightError(f"{path}: parameterization is {repr(word)[:80]}; minisd knows eps and v")
    return PREDICTIONS[word]


def check_official(path: Path, params: dict[str, Tree], config: Config) -> None:
    """WeightError where the params give another noise schedule, or scale of the latents, than the
    official model has."""
    schedule = config.schedule
    official = {"linear_start": schedule.beta_start, "linear_end": schedule.beta_end,
                "timesteps": schedule.num_train_timesteps,
                "scale_factor": config.vae.scaling_factor}
    for name, want in official.items():
        value = params.get(name, str(want))
        if not isinstance(value, str) or not _is(value, want):
            raise WeightError(f"{path}: {name} is {repr(value)[:80]}, not {want} as in Stable "
                              "Diffusion; such a model needs config= (--config)")


def _document(data: bytes) -> Tree:
    """The one document of a stream; "" for an empty one."""
    events = _checked(yaml.parse(data, Loader=yaml.BaseLoader))
    next(events)  # the stream begins
    if not isinstance(next(events), yaml.DocumentStartEvent):
        return ""
    tree = _node(events, next(events), 0)
    next(events)  # the document ends
    if not isinstance(next(events), yaml.StreamEndEvent):
        raise ValueError("it has a second document")
    return tree


def _checked(events: Iterator[yaml.Event]) -> Iterator[yaml.Event]:
    """The same events, if they are few, and none makes an object or repeats another node."""
    for number, event in enumerate(events):
        if number > MAX_EVENTS:
            raise ValueError(f"it has more than {MAX_EVENTS} keys and values")
        if getattr(event, "anchor", None) is not None:  # an alias has the name of its anchor
            raise ValueError("it has an anchor or an alias")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"it has the tag {repr(event.tag)[:80]}")
        yield event


def _node(events: Iterator[yaml.Event], start: yaml.Event, depth: int) -> Tree:
    """The node that begins with the event ``start``, with all that is in it."""
    if isinstance(start, yaml.ScalarEvent):
        return start.value
    if depth >= MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    items = []
    while not isinstance(event := next(events), yaml.CollectionEndEvent):
        items.append(_node(events, event, depth + 1))
    return items if isinstance(start, yaml.SequenceStartEvent) else _mapping(items)


def _mapping(items: list[Tree]) -> dict[str, Tree]:
    """Keys and values by turns, as a mapping."""
    mapping: dict[str, Tree] = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Readers disagree on what is there twice, and on "<<", which merges mappings.
        if not isinstance(key, str) or key == "<<" or key in mapping:
            raise ValueError(f"the key {repr(key)[:80]} is there twice, or none that minisd reads")
        mapping[key] = value
    return mapping


def _scaling(tree: Tree) -> str:
    """LDM's word for the class that scales what sgm's denoiser answers, or that class."""
    for key in ("params", "scaling_config", "target"):
        tree = tree.get(key, "") if isinstance(tree, dict) else ""
    name = tree.rpartition(".")[2] if isinstance(tree, str) else ""
    return SCALINGS.get(name, name)


def _reason(error: Exception) -> str:
    """What PyYAML says, in one line."""
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    mark = getattr(error, "problem_mark", None)
    line = f" in line {mark.line + 1}" if mark else ""
    return " ".join(str(what).split())[:200] + line


def _is(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False
