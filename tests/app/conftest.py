"""The command line without a model: a mock takes its calls."""

from types import SimpleNamespace

import pytest
from PIL import Image

import minisd
from minisd.config import SD1


class FakeModel:
    """A mock of a loaded model: returns black images, and records its calls."""

    def __init__(self):
        self.loaded, self.calls, self.failure, self.defaults = [], [], None, {}
        self.nsfw = None

    def load(self, path=None, **options):
        self.loaded.append((path, options))
        return self

    def __call__(self, prompt, *, seed, progress, image=None, mask_image=None, **call):
        self.calls.append({"prompt": prompt, "seed": seed, "progress": progress, "image": image,
                           "mask_image": mask_image, **call})
        if self.failure and len(self.calls) == self.failure[0]:
            raise self.failure[1]
        settings = {"width": 64, "height": 64, "model": "fake", **self.defaults, **call,
                    "prompt": prompt, "seed": seed}
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))], settings=[settings],
                               nsfw=self.nsfw)


@pytest.fixture
def model(monkeypatch, tmp_path):
    fake = FakeModel()
    monkeypatch.setitem(vars(minisd), "load", fake.load)  # without importing the real one
    monkeypatch.setattr("minisd.checkpoints.checkpoint.open_checkpoint",
                        lambda *_, **__: SimpleNamespace(config=SD1))
    monkeypatch.chdir(tmp_path)
    return fake
