"""A page of `minisd explain`, made, parsed and checked; and a small model that is watched."""

import base64
import copy
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from command_line import run
from PIL import Image
from small_models import small_model

import minisd
from minisd.app.explain import WordMaps

PROMPT = "a red heart on a blue background"
ASKED = ["--seed", "5", "--steps", "3", "--quiet", "--device", "cpu"]
VOID = {"meta", "img", "br"}
TAGS = VOID | {
    "html", "head", "title", "style", "body", "header", "div", "h1", "h2", "h3", "p", "nav", "ol",
    "ul", "li", "a", "main", "section", "code", "span", "b", "i", "bdi", "table", "tr", "th", "td",
    "figure", "figcaption", "sub", "sup", "pre", "footer", "svg", "path", "polyline", "circle",
    "text",
}
HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


class Parsed(HTMLParser):
    """A page's tags with their attributes, and its text; AssertionError where a tag is not closed.
    """

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join("".join(self.texts).split())
        self.images = [attributes for tag, attributes in self.tags if tag == "img"]

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self._open
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(data)


def picture(source: str) -> Image.Image:
    head, data = source.split(",", 1)
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        image.load()
        return image


def explained(folder: Path, *line: str) -> str:
    code, out, err = run(["explain", *line, *ASKED, "-o", str(folder / "page.html")])
    assert (code, out) == (0, f"{folder / 'page.html'}  seed 5\n"), err
    return (folder / "page.html").read_text(encoding="utf-8")


def check(text: str) -> Parsed:
    """It is valid, and needs nothing but itself."""
    parsed = Parsed(text)
    assert text.startswith("<!DOCTYPE html>\n<html lang=\"en\">") and HIDDEN.search(text) is None
    assert {tag for tag, _ in parsed.tags} <= TAGS
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and "curves" in ids
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes or tag == "img"
        if "href" in attributes:
            assert tag == "a"
            target = attributes["href"]
            assert target.startswith("https://arxiv.org/abs/") or target.removeprefix("#") in ids
    assert parsed.images
    for image in parsed.images:
        assert image["alt"].strip()
        assert picture(image["src"]).format == "PNG"
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert style.count("{") == style.count("}") and "prefers-color-scheme: dark" in style
    return parsed


def watched_model(config) -> tuple[minisd.StableDiffusion, WordMaps]:
    words, sd = WordMaps(), copy.deepcopy(small_model(config))
    for module in (module for part in sd.parts.values() for module in part.modules()):
        if hasattr(module, "ops"):
            module.ops = words.ops
    return sd, words
