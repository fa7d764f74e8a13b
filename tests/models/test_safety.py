"""The safety checker equals diffusers': its cosines, its rule to the last rounding, its files."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance
from PIL import Image
from reference_models import (
    VISION,
    error,
    official_flags,
    official_safety_checker,
    randn,
    randomise,
    with_weights,
)
from safetensors.torch import load_file, save_file

import minisd
from minisd.images import to_clip
from minisd.models import safety
from minisd.models.clip_vision import VisionTower
from minisd.models.ops import TORCH

# Margins over a threshold, about where rounding to three decimals changes what is above 0.
EDGES = [-1.0, *(edge + shift for edge in (-0.0105, -0.0095, -0.0005, 0.0005, 0.0015)
                 for shift in (-1e-4, -2e-6, 2e-6, 1e-4)), 0.1]


def test_the_rule_about_its_edges():
    """One vector of special care and one concept at a time, each at every margin."""
    cases = [*product(EDGES, range(3), EDGES, (0, 9, 16))]
    special, concepts = torch.full((len(cases), 3), -1.0), torch.full((len(cases), 17), -1.0)
    for i, (care, which, margin, concept) in enumerate(cases):
        special[i, which], concepts[i, concept] = care, margin
    ours = (safety.scores(special, concepts) > 0).any(dim=1).tolist()
    assert ours == official_flags(special, concepts)
    flagged = {(round(care, 4), round(margin, 4)) for (care, _, margin, _), flag
               in zip(cases, ours) if flag}
    assert (-1, 0.0006) in flagged and (-1, 0.0004) not in flagged
    assert (0.0006, -0.0094) in flagged and (0.0006, -0.0096) not in flagged
    assert (0.0004, -0.0094) not in flagged and (0.1, -1) not in flagged


def test_scores_are_rounded_as_by_numpy():
    special, concepts = (0.002 * randn(500, n, dtype=torch.float32) for n in (3, 17))
    want = torch.empty(500, 17)
    for i, (row, margins) in enumerate(zip(special.numpy(), concepts.numpy())):
        adjustment = 0.0
        for margin in row:
            adjustment = 0.01 if round(margin + adjustment, 3) > 0 else adjustment
        want[i] = torch.tensor([round(margin + adjustment, 3) for margin in margins])
    assert torch.equal(safety.scores(special, concepts), want)


PICTURES = [Image.fromarray((255 * randn(14, 20, 3, seed=i).mul(2).sigmoid()).byte().numpy())
            for i in range(60)]
PIXELS = torch.cat([to_clip(picture, 12) for picture in PICTURES])


@pytest.fixture(scope="module")
def pair():
    """Ours and diffusers', with thresholds that some of the pictures pass."""
    with torch.no_grad():
        ours = randomise(safety.ConceptScores(VISION, TORCH))
        for embeds, thresholds, share in (
                (ours.concept_embeds, ours.concept_embeds_weights, 0.95),
                (ours.special_care_embeds, ours.special_care_embeds_weights, 0.8)):
            cosines = safety.cosine(VisionTower.forward(ours, PIXELS.double()), embeds)
            thresholds.copy_(cosines.quantile(share, dim=0))
        return ours, with_weights(official_safety_checker(VISION), ours)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flags_and_scores_of_images(pair, dtype):
    ours, official = (model.to(dtype) for model in pair)
    pixels = PIXELS.to(dtype)
    found = ours(pixels)
    assert found.dtype == torch.float32
    flags = (found > 0).any(dim=1).tolist()
    assert flags == official(pixels, torch.zeros(60, 1))[1]
    assert 10 < sum(flags) < 50
    embedding = official.visual_projection(official.vision_model(pixels)[1])
    special = cosine_distance(embedding, official.special_care_embeds)
    concepts = cosine_distance(embedding, official.concept_embeds)
    assert error(safety.cosine(embedding, ours.concept_embeds), concepts) <= 3e-7
    care = ((special - official.special_care_embeds_weights) > 0.0005).any(dim=1)
    want = concepts - official.concept_embeds_weights + 0.01 * care[:, None]
    assert error(found, want) <= 0.00051 and 10 < care.sum() < 50


# --- from a folder


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "safety_checker"
    pair[1].float().save_pretrained(place)
    return place


@pytest.fixture
def copied(folder, tmp_path):
    """The folder again, whose tensors a test changes."""
    def copy(change):
        tensors = load_file(folder / "model.safetensors")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        save_file(change(tensors), tmp_path / "model.safetensors")
        return tmp_path
    return copy


def test_a_folder_is_loaded_and_flags_as_diffusers_does(folder, pair):
    checker = minisd.SafetyChecker.load(folder)
    flags = checker(PICTURES)
    assert flags == pair[1].float()(PIXELS, torch.zeros(60, 1))[1]
    assert len(set(flags)) == 2 and set(map(type, flags)) == {bool}
    assert not any(p.requires_grad for p in checker.parameters())


def test_every_form_of_an_image_is_the_same(folder, tmp_path):
    checker = minisd.SafetyChecker.load(folder)
    flags = checker(PICTURES)
    PICTURES[0].save(tmp_path / "a.png")
    assert checker(PICTURES[0]) == checker(str(tmp_path / "a.png")) == flags[:1]
    array = np.stack([np.float32(picture) / 255 for picture in PICTURES])
    assert checker(array) == checker(torch.tensor(array).permute(0, 3, 1, 2)) == flags
    assert checker([]) == []


def test_the_published_spelling_and_the_model_around_it(folder, copied):
    def spelled(tensors):
        renamed = {name.replace("vision_model.", "vision_model.vision_model."): t
                   for name, t in tensors.items()}
        return renamed | {"vision_model.vision_model.embeddings.position_ids": torch.arange(10.0)}

    flags = minisd.SafetyChecker.load(folder)(PICTURES)
    assert minisd.SafetyChecker.load(copied(spelled))(PICTURES) == flags
    (folder.parent / "model_index.json").write_text("{}")
    assert minisd.SafetyChecker.load(folder.parent)(PICTURES) == flags


def test_dtypes(folder):
    assert minisd.SafetyChecker.load(folder).network.concept_embeds.dtype == torch.float32
    half = minisd.SafetyChecker.load(folder, dtype="float16")
    assert half.network.concept_embeds.dtype == torch.float16
    assert len(half(PICTURES[:2])) == 2


def test_an_image_that_could_not_be_checked_is_flagged(folder):
    checker = minisd.SafetyChecker.load(folder)
    checker.network.visual_projection.weight.fill_(float("inf"))
    assert checker(PICTURES[:2]) == [True, True]


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("concept_embeds_weights"), "1 missing: concept_embeds_weights"),
    (lambda t: t.update(more=torch.zeros(1)), "1 unexpected: more"),
    (lambda t: t.update(concept_embeds=torch.zeros(16, 16)),
     r"concept_embeds \[16, 16\] for \[17, 16\]"),
    (lambda t: t.update(concept_embeds=torch.zeros(17, 16, dtype=torch.int8)), "concept_embeds I8"),
    (lambda t: t.update(concept_embeds=torch.full((17, 16), float("nan"))), "has NaN"),
    (lambda t: t.update({"vision_model.vision_model.pre_layrnorm.bias": torch.zeros(24)}),
     "one tensor twice: vision_model.*pre_layrnorm.bias and vision_model.*pre_layrnorm.bias"),
])
def test_tensors_that_do_not_fit(copied, change, words):
    def changed(tensors):
        change(tensors)
        return tensors

    with pytest.raises(minisd.WeightError, match=words) as caught:
        minisd.SafetyChecker.load(copied(changed))
    assert "\n" not in str(caught.value) and str(copied(dict)) in str(caught.value)


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        minisd.SafetyChecker.load(tmp_path / "nowhere")
    with pytest.raises(minisd.WeightError, match="config.json is missing"):
        minisd.SafetyChecker.load(tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    fields["vision_config"]["hidden_act"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(minisd.WeightError, match="config.json: hidden_act is 'relu'"):
        minisd.SafetyChecker.load(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(minisd.WeightError, match="has no model.safetensors"):
        minisd.SafetyChecker.load(tmp_path)
