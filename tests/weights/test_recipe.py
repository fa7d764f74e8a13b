"""The recipe of the shipped model in small: from three emoji to a folder that loads."""

import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

import minisd
from minisd.checkpoints.tokenizer_folder import read_tokenizer
from weights.recipe import stage, train
from weights.recipe.evaluate import Evaluation, Gallery
from weights.recipe.scenes import BACKGROUNDS, LAYOUTS, NOWHERE, Scenes, caption, catalogue, compose

KEYWORDS = {
    "🍎": ["red_apple", "fruit", "mac"],
    "🍐": ["pear", "fruit", "juicy pear"],
    "🍏": ["green_apple_that_looks_red"],
    "🇫🇷": ["flag_france"],
    "👍": ["thumbs_up", "+1", "it’s ok"],
}
SHAPES = {
    "1f34e": ("red", (10, 10, 120, 200)), "1f350": ("green", (120, 30, 250, 250)),
    "1f34f": ("red", (10, 10, 120, 201)), "1f1eb-1f1f7": ("blue", (0, 0, 255, 99)),
} | {
    "1f44d" + tone: (colour, (60, 120, 200, 180)) for tone, colour in {
        "": "yellow", "-1f3fb": "white", "-1f3fc": "pink", "-1f3fd": "orange", "-1f3fe": "gray",
        "-1f3ff": "brown"}.items()
}
PLAN = train.Plan(32, 9, (8, 16), 4, (16, 32), (0.01, 0.01, 0.02), (4, 4, 4), 0.5)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    state = tmp_path_factory.mktemp("state")
    (state / "data").mkdir()
    (state / "data/emoji-en-US.json").write_text(json.dumps(KEYWORDS))
    for code, (colour, box) in SHAPES.items():
        image = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(image).ellipse(box, fill=colour)
        image.save(state / f"data/{code}.webp", lossless=True)
    catalogue(state, PLAN.size, PLAN.things)
    return state


@pytest.fixture(scope="module")
def objects(state):
    return json.loads((state / "objects.json").read_text())["objects"]


@pytest.fixture(scope="module")
def scenes(state, objects):
    return Scenes(objects, 0.3, 16, read_tokenizer(state / "tokenizer"))


def test_which_objects_are_trained_and_their_names(objects):
    assert [o["names"] for o in objects] == [
        ["pear", "juicy pear"], ["red apple", "mac"], ["thumbs up", "its ok"],
    ]
    assert [o["first"] for o in objects] == [0, 1, 2]
    tones = ("light", "medium light", "medium", "medium dark", "dark")
    assert objects[2]["skin_tones"] == ["", *(f" with {tone} skin tone" for tone in tones)]


def test_words_of_captions_are_single_tokens(state, scenes):
    words = set((state / "words.txt").read_text().split())
    rng = random.Random(0)
    for _ in range(200):
        caption = scenes.draw(rng)[3]
        ids = scenes.tokenizer([caption])[0].tolist()
        assert ids.index(scenes.tokenizer.eos_token_id) == 1 + len(caption.split())
        assert words >= set(caption.split())


def test_a_batch_is_the_same_for_its_number(scenes):
    first, again, other = scenes[3], scenes[3], scenes[4]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[3], other[3])


def test_captions_are_empty_at_times_and_held_out_pairs_never_drawn(objects, scenes):
    rng = random.Random(1)
    drawn = [scenes.draw(rng) for _ in range(2000)]
    assert 0.07 < sum(not caption for *_, caption in drawn) / len(drawn) < 0.13
    names = {colour: name for name, colour in BACKGROUNDS.items()}
    owner = [thing for thing in objects for _ in thing["skin_tones"]]
    for which, places, colour, _ in drawn:
        for index, place in zip(which, places, strict=True):
            assert place == NOWHERE or names[colour] not in owner[index]["held_out"]


def place(rgba, *places):
    places = torch.tensor([[*places, NOWHERE][:2]])
    blue = torch.tensor([BACKGROUNDS["blue"]])
    return (compose(rgba, torch.tensor([[0, 0]]), places, blue)[0] + 1) * 127.5


def test_where_things_are_put():
    rgba = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    rgba[0, :, 20:40, 8:30] = torch.tensor([200, 100, 50, 255])[:, None, None]
    blue = torch.tensor(BACKGROUNDS["blue"]).float()[:, None, None]
    plain = place(rgba, *LAYOUTS["{}"])
    expected = torch.where(rgba[0, 3] > 0, rgba[0, :3].float(), blue)
    torch.testing.assert_close(plain, expected, atol=0.01, rtol=0)
    half = torch.nn.functional.avg_pool2d(expected, 2)
    left = place(rgba, *LAYOUTS["small {} on the left"])
    torch.testing.assert_close(left[:, 16:48, :32], half, atol=0.01, rtol=0)
    torch.testing.assert_close(left[..., 32:], blue.expand(3, 64, 32), atol=0.01, rtol=0)
    top = place(rgba, *LAYOUTS["small {} at the top"])
    torch.testing.assert_close(top[:, :32, 16:48], half, atol=0.01, rtol=0)
    pair = place(rgba, *LAYOUTS["{} beside {}"])
    torch.testing.assert_close(pair[:, 16:48], torch.cat([half, half], -1), atol=0.01, rtol=0)


@pytest.fixture
def gradients():
    with torch.enable_grad():
        yield


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, number):
        return torch.tensor([float(number)]), torch.ones(1)


def network():
    torch.manual_seed(0)
    words, other = torch.nn.Embedding(2, 1), torch.nn.Conv2d(1, 2, 1)
    return torch.nn.ModuleDict({"token_embedding": words, "other": other})


@pytest.mark.usefixtures("gradients")
def test_a_killed_run_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "SAVE_EVERY", 5)

    def pull(run):
        run.update(sum(p.square().sum() for p in run.models.parameters()))

    first = stage.Run(tmp_path, [network()], 1)
    for numbers, _ in first.batches(Numbers()):
        if numbers.item() == 5:
            seconds, kept = first.seconds, {n: v.clone() for n, v in first.kept.items()}
        if numbers.item() == 8:
            break
        pull(first)
    (tmp_path / "state.tmp").write_bytes(b"killed while this was written")
    again = stage.Run(tmp_path, [network()], 1)
    assert again.step == 5 and again.seconds == seconds > 0
    assert all(torch.equal(again.kept[name], vector) for name, vector in kept.items())
    assert next(again.batches(Numbers()))[0].item() == 5
    for _ in range(3):
        pull(again)
    torch.testing.assert_close(again.kept["now"], first.kept["now"], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("gradients")
def test_a_run_with_a_nan_loss_stops_before_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "SAVE_EVERY", 2)
    monkeypatch.setattr(stage, "LOG_EVERY", 2)
    run = stage.Run(tmp_path, [network()], 1)
    with pytest.raises(AssertionError, match="at step 4 the loss is nan"):
        for factor in (1, 1, float("nan"), 1):
            run.update(factor * sum(p.square().sum() for p in run.models.parameters()))
    assert stage.Run(tmp_path, [network()], 1).step == 2


@pytest.mark.usefixtures("gradients")
def test_token_embeddings_have_a_higher_rate_which_ends_at_zero(tmp_path):
    run = stage.Run(tmp_path, [network()], 1)
    run.step = stage.WARM_UP
    before = run.kept["now"].clone()
    run.update(sum(p.sum() for p in run.models.parameters()))
    moved = (run.kept["now"] - before).abs()
    assert run.words == slice(4, 6)
    torch.testing.assert_close(moved[4:], 10 * moved[:1].expand(2), rtol=0.05, atol=0)  # decay
    run.seconds = run.budget
    before = run.kept["now"].clone()
    run.update(sum(p.sum() for p in run.models.parameters()))
    assert torch.equal(run.kept["now"], before)


@pytest.mark.usefixtures("gradients")
def test_from_nothing_to_a_model_that_loads_here_and_in_diffusers(state, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PLANS", {"cpu": PLAN, "gpu": PLAN})
    monkeypatch.setattr(train, "SAMPLES", ["a pear", "a red apple on a blue background"])
    monkeypatch.setattr(train, "SHEET_EVERY", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for out in ("first", "again"):  # the second run reads the finished stages
        train.main(["cpu", "--state", str(state), "--out", str(tmp_path / out)])
    with pytest.raises(IsADirectoryError, match="again is a folder"):
        train.main(["cpu", "--state", str(state), "--out", str(tmp_path / "again")])
    with pytest.raises(SystemExit):
        train.main(["gpu", "--state", str(state), "--out", str(tmp_path / "gpu")])
    with Image.open(state / "sheet-1.png") as sheet:
        assert sheet.size == (64, 32)
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.*"))
    assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "again" / f).read_bytes()
               for f in files)
    sd = minisd.load(tmp_path / "again")
    assert sd.config.vae.scaling_factor != 1
    ours = sd("a pear", num_inference_steps=3, seed=3).images[0]
    pipeline = StableDiffusionPipeline.from_pretrained(str(tmp_path / "again")).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline("a pear", num_inference_steps=3, generator=torch.Generator().manual_seed(3))
    a, b = (np.asarray(image).astype(int) for image in (ours, theirs.images[0]))
    assert a.shape == (32, 32, 3) and np.abs(a - b).max() <= 1
    assert (state / "diffusion/state.safetensors").exists()


def test_the_nearest_emoji_of_an_emoji_is_itself(state, objects):
    gallery = Gallery(state, torch.device("cpu"))
    asked = [(i, b) for i in range(len(objects)) for b in (0, 5)]
    choices = [(objects[0]["first"], places[0]) for places in LAYOUTS.values()]
    for number, (layout, places) in enumerate(LAYOUTS.items()):
        first = [torch.tensor([objects[i]["first"]]) for i, _ in asked]
        pixels = [gallery.place(f, places[0], b) for f, (_, b) in zip(first, asked, strict=True)]
        pixels = torch.cat(pixels)
        assert gallery.right_border(pixels, asked).min() == 1
        assert not gallery.ranks(pixels, asked, layout).any(), layout
        wrong = [((i + 1) % len(objects), b) for i, b in asked]
        assert gallery.ranks(pixels, wrong, layout).all(), layout
        assert len(places) == 2 or gallery.chosen(pixels[0], 0, choices) == number


class Painter:
    """A mock model: it returns the scene asked for, or its mirror image."""

    def __init__(self, gallery, mirrored):
        self.vae, self.mirrored, self.known = self, mirrored, {}
        self.blue, self.red = (torch.tensor(BACKGROUNDS[b])[:, None, None] for b in ("blue", "red"))
        everyone = [(i, tone) for i, thing in enumerate(gallery.objects)
                    for tone in range(len(thing["skin_tones"]))]
        for layout, places in gallery.layouts.items():
            for things in itertools.product(everyone, repeat=len(places)):
                self.learn(gallery, layout, places, things)

    def learn(self, gallery, layout, places, things):
        owners = [gallery.objects[i] for i, _ in things]
        which = torch.tensor([[o["first"] + t for o, (_, t) in zip(owners, things, strict=True)]])
        names = [o["names"][0] + o["skin_tones"][t]
                 for o, (_, t) in zip(owners, things, strict=True)]
        for background in BACKGROUNDS:
            colour = torch.tensor([BACKGROUNDS[background]])
            image = compose(gallery.full, which, torch.tensor([places]), colour)[0]
            self.known[caption(layout, names, background)] = (image + 1) / 2

    def __call__(self, prompts, negative_prompt=None, **settings):
        plain = (self.red if negative_prompt else self.blue).expand(3, 64, 64) / 255
        images = torch.stack([self.known.get(prompt, plain) for prompt in prompts])
        return SimpleNamespace(images=images.flip(-1) if self.mirrored else images)

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, image):
        return image

    def decode(self, image):
        return image - 0.02 * image.sign()


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_figures_of_a_perfect_and_of_a_mirrored_model(state, mirrored):
    gallery = Gallery(state, torch.device("cpu"))
    evaluation = Evaluation(Painter(gallery, mirrored), gallery, 200, {})
    evaluation.measure()
    figures = {name: figure["mean"] for name, figure in evaluation.figures.items()}
    assert figures.pop("autoencoder, dB") == pytest.approx(40, abs=0.01)
    assert len(figures) == 14
    if mirrored:
        assert figures["border, beside"] == figures["object, trained, top 5"] == 1
        assert figures["object, trained, top 1"] < 1 and figures["object, beside, top 1"] < 1
        assert figures["layout, small {} on the right"] == 0
    else:
        assert set(figures.values()) == {1}
        assert evaluation.sweep("guidance_scale")[1]["top 1, %"] == 100


@pytest.mark.parametrize("plan", train.PLANS.values(), ids=train.PLANS)
def test_a_plan_fits_into_the_wheel_and_loads(plan, state, tmp_path):
    recipe = train.Recipe(plan, state)
    for p in recipe.encoder.embeddings.parameters():  # training draws them
        torch.nn.init.normal_(p)
    recipe.export(tmp_path / "model")
    more_words = 4500 - recipe.tokenizer.vocab_size  # in the full vocabulary, and their letters
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size + 2 * train.WIDTH * more_words + 200_000 < 24e6
    assert minisd.load(tmp_path / "model").config.sample_size == plan.size
