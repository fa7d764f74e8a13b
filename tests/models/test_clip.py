"""The text encoder equals transformers' CLIPTextModel; SD2's is 23 of OpenCLIP's 24 layers."""

from dataclasses import replace

import pytest
import torch
from reference_models import (
    TEXT,
    error,
    errors_by_module,
    official_text_encoder,
    randomise,
    with_weights,
)

from minisd.config import SD1, SD2
from minisd.models.clip import TextEncoder
from minisd.models.ops import REFERENCE, TORCH

PAIR = pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
ACTIVATION = pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
SHORT = replace(TEXT, vocab_size=100)


def random_ids(batch=3, tokens=77):
    return torch.randint(100, (batch, tokens), generator=torch.Generator().manual_seed(0))


def pair(act, ops, dtype):
    config = replace(SHORT, hidden_act=act)
    ours = randomise(TextEncoder(config, ops)).to(dtype)
    return ours, with_weights(official_text_encoder(config), ours)


@PAIR
@ACTIVATION
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_module(act, ops, dtype, bound):
    ours, official = pair(act, ops, dtype)
    errors = errors_by_module(ours, official, random_ids())
    assert len(errors) > 30 and "final_layer_norm" in errors
    assert max(errors.values()) <= bound, max(errors, key=errors.get)
    assert error(ours(random_ids()), official(random_ids()).last_hidden_state) <= bound


def test_the_ops_are_told_by_name_that_attention_is_causal():
    """The kernel's fifth argument is the scale, which would be True, that is 1."""
    def attention(q, k, v, heads, scale=None, *, causal=False):
        assert scale is None
        return TORCH.attention(q, k, v, heads, causal)

    ours, official = pair("gelu", replace(TORCH, attention=attention), torch.float64)
    assert error(ours(random_ids()), official(random_ids()).last_hidden_state) <= 1e-10


@pytest.mark.parametrize("tokens", [1, 5, 76])
def test_fewer_tokens_than_positions(tokens):
    ours, official = pair("gelu", TORCH, torch.float64)
    ids = random_ids(2, tokens)
    assert error(ours(ids), official(ids).last_hidden_state) <= 1e-10


def test_a_token_does_not_attend_to_later_ones():
    ours, _ = pair("quick_gelu", TORCH, torch.float64)
    ids = random_ids()
    other = ids.clone()
    other[:, 40:] = (other[:, 40:] + 1) % 100
    assert torch.equal(ours(ids)[:, :40], ours(other)[:, :40])
    assert not torch.isclose(ours(ids)[:, 40:], ours(other)[:, 40:]).all()


def test_sd2_reads_the_last_layer_but_one():
    """Our 23 layers equal OpenCLIP's 24, read after the 23rd and the final LayerNorm."""
    config = replace(SHORT, hidden_act="gelu", num_hidden_layers=24)
    official = randomise(official_text_encoder(config))
    ours = TextEncoder(replace(config, num_hidden_layers=23), TORCH).double()
    used = {k: v for k, v in official.state_dict().items() if ".layers.23." not in k}
    ours.load_state_dict(used, strict=True)
    states = official(random_ids(), output_hidden_states=True).hidden_states
    assert len(states) == 25
    assert error(ours(random_ids()), official.final_layer_norm(states[23])) <= 1e-10
    assert error(ours(random_ids()), official.final_layer_norm(states[24])) > 1e-2


@pytest.mark.parametrize("config, tensors", [(SD1, 196), (SD2, 372)], ids=["SD1", "SD2"])
def test_names_and_shapes_of_the_official_models(config, tensors):
    with torch.device("meta"):
        ours = TextEncoder(config.text, TORCH)
        official = official_text_encoder(config.text)
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert shapes == {name: p.shape for name, p in official.state_dict().items()}
    assert len(shapes) == tensors
