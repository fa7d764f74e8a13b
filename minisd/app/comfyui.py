"""The graph that ComfyUI writes into its images, read as the settings of its samplers.

A PNG has it twice: under "prompt" as it ran, node -> its class and its inputs, where an input is a
value or a link [node, output]; and under "workflow" as it was drawn, where a node has a list of
values without names. Any node may be of somebody else's making, so what is not there, or not of its
type, is left out.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

# Far above any graph that was drawn; a hostile one costs seconds at most.
MAX_TEXT = 4 * 2**20
MAX_NODES = 10_000
MAX_SAMPLERS = 8

# Our name (theirs where the meaning differs) -> the inputs of a sampler that say it, their types.
FIELDS: dict[str, tuple[tuple[str, ...], tuple[type, ...]]] = {
    "seed": (("seed", "noise_seed"), (int,)),
    "num_inference_steps": (("steps",), (int,)),
    "guidance_scale": (("cfg",), (int, float)),
    "sampler": (("sampler_name",), (str,)),
    "scheduler": (("scheduler",), (str,)),
    "denoise": (("denoise",), (int, float)),
}
SAMPLES = {"steps", "cfg", "positive"}  # a node with these inputs is a sampler
MODELS = ("ckpt_name", "unet_name")
TEXTS = ("text", "text_g", "text_l", "string", "value", "prompt")
TOWARDS_TEXT = re.compile(r"(conditioning|text|string|value|prompt)")
NO_TEXT = "ConditioningZeroOut"  # a node behind which a text has no effect
OFF = (2, 4)  # the modes of a drawn node that does not run, or is passed by
# The values of a drawn node, in their order; None is one that is not of interest.
DRAWN: dict[str, tuple[str | None, ...]] = {
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        None, "noise_seed", None, "steps", "cfg", "sampler_name", "scheduler"),
    "CLIPTextEncode": ("text",),
    "CheckpointLoaderSimple": ("ckpt_name",),
}

Graph = dict[str, dict]  # node -> its inputs by name


class Link(NamedTuple):
    """An input that is another node's output."""

    node: str


def read_prompt(text: str) -> dict:
    """The settings of a graph as it ran; ValueError where it has no sampler or is no graph."""
    rows = _parsed(text).items()
    graph = {name: node["inputs"] for name, node in rows
             if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
             and node.get("class_type") != NO_TEXT}
    return _settings({node: {name: _linked(value) for name, value in inputs.items()}
                      for node, inputs in graph.items()})


def read_workflow(text: str) -> dict:
    """The settings of a graph as it was drawn, of the nodes in ``DRAWN``; ValueError as above."""
    drawn = _parsed(text)
    links = {_name(row[0]): Link(_name(row[1])) for row in _rows(drawn.get("links"))
             if isinstance(row, list) and len(row) > 2}
    graph = {}
    for node in _rows(drawn.get("nodes")):
        if isinstance(node, dict) and node.get("type") != NO_TEXT:
            graph[_name(node.get("id"))] = _drawn(node) | _ends(node, links)
    return _settings(graph)


def _parsed(text: str) -> dict:
    """A JSON object that is not too large; NaN, which ComfyUI writes and JSON has not, is None."""
    if len(text) > MAX_TEXT:
        long = f"{len(text):,} characters"
        raise ValueError(f"its graph of ComfyUI has {long}; {MAX_TEXT:,} are read")
    try:
        graph = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its graph of ComfyUI is not readable JSON: {error}") from None
    if not isinstance(graph, dict):
        raise ValueError("its graph of ComfyUI is not a JSON object")
    return graph


def _linked(value: object) -> object:
    """A link as one, and any other value as it is."""
    if isinstance(value, list) and len(value) == 2:
        return Link(_name(value[0]))
    return value


def _name(value: object) -> str:
    """A node's or a link's name, in some places a number; "" is none."""
    return str(value) if isinstance(value, (str, int)) else ""


def _rows(value: object) -> list:
    return value if isinstance(value, list) else []


def _drawn(node: dict) -> dict:
    """The named values of a drawn node."""
    names = () if node.get("mode") in OFF else DRAWN.get(_name(node.get("type")), ())
    values = _rows(node.get("widgets_values"))
    return {name: value for name, value in zip(names, values) if name is not None}


def _ends(node: dict, links: dict[str, Link]) -> dict:
    """The linked inputs of a drawn node."""
    ends = (end for end in _rows(node.get("inputs")) if isinstance(end, dict))
    return {_name(end.get("name")): links[_name(end.get("link"))]
            for end in ends if _name(end.get("link")) in links}


def _settings(graph: Graph) -> dict:
    """Those of the first sampler in the graph, and of the others."""
    if len(graph) > MAX_NODES:
        raise ValueError(f"its graph of ComfyUI has {len(graph):,} nodes; {MAX_NODES:,} are read")
    samplers = [inputs for inputs in graph.values() if inputs.keys() >= SAMPLES]
    if not samplers:
        raise ValueError("its graph of ComfyUI has no KSampler node, which would say the settings")
    first, *others = [_sampler(graph, inputs) for inputs in samplers[:MAX_SAMPLERS]]
    return {"program": "ComfyUI", **first} | ({"other_samplers": others} if others else {})


def _sampler(graph: Graph, inputs: dict) -> dict:
    found = {
        "prompt": _text(graph, inputs, "positive"),
        "negative_prompt": _text(graph, inputs, "negative"),
        **{name: _value(graph, inputs, *wanted) for name, wanted in FIELDS.items()},
        "model": _model(graph, inputs),
    }
    return {name: value for name, value in found.items() if value is not None}


def _text(graph: Graph, inputs: dict, side: str) -> str | None:
    """The texts that one side of a sampler leads to, a line each; None without any."""
    def ahead(inputs: dict) -> list[object]:
        # A ControlNet has both sides: each leads on to the same one.
        return [value for name, value in inputs.items()
                if name == side or TOWARDS_TEXT.match(name)]

    nodes = _walk(graph, [inputs.get(side)], ahead)
    texts = [node[name] for node in nodes for name in (*TEXTS, side)
             if isinstance(node.get(name), str)]
    return "\n".join(dict.fromkeys(texts)) if texts else None


def _value(graph: Graph, inputs: dict, names: tuple[str, ...],
           types: tuple[type, ...]) -> object:
    """The value of an input, or of the node that it is linked to, such as a generator of seeds."""
    def said(node: dict) -> list[object]:
        return [node[name] for name in (*names, "value") if name in node]

    values = said(inputs)
    values += [value for node in _walk(graph, values, said) for value in said(node)]
    return next((value for value in values if type(value) in types and _is_finite(value)), None)


def _model(graph: Graph, inputs: dict) -> str | None:
    """The name of the checkpoint, behind whatever changes it on the way."""
    nodes = _walk(graph, [inputs.get("model")], lambda node: [node.get("model")])
    names = (node.get(name) for node in nodes for name in MODELS)
    return next((name for name in names if isinstance(name, str)), None)


def _walk(graph: Graph, starts: list, ahead: Callable[[dict], list]) -> Iterator[dict]:
    """The inputs of each node that links lead to, once each: a graph may have circles."""
    waiting, seen = starts[::-1], set[str]()
    while waiting:
        link = waiting.pop()
        if isinstance(link, Link) and link.node in graph and link.node not in seen:
            seen.add(link.node)
            yield graph[link.node]
            waiting += ahead(graph[link.node])[::-1]


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
