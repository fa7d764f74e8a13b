"""What a loaded model says of its ops, and the README's table of what the kernels take."""

from pathlib import Path

import pytest
import torch
from torch.nn import GroupNorm

import minisd
from minisd.config import SD1
from minisd.coverage import coverage
from minisd.ops import REFERENCE
from minisd.unet import Attention

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_a_loaded_model_says_what_every_call_took_and_why():
    sd = minisd.load()
    calls = sd.coverage()
    functions = {GroupNorm: "group_norm_silu", Attention: "attention"}
    modules = [functions[type(m)] for m in sd.unet.modules() if type(m) in functions]
    assert sorted(call.function for call in calls) == sorted(modules)
    assert {call.took for call in calls} == {"torch"}
    assert all(call.why == sd.unet.ops.why for call in calls)
    assert len(sd.coverage(height=128)) == len(calls)
    with pytest.raises(ValueError, match="height"):
        sd.coverage(height=3)


def test_ops_by_name_say_that_kernels_were_not_asked_for():
    calls = coverage(SD1.unet, REFERENCE, 8, 8, torch.float32)
    assert {(call.took, call.why) for call in calls} == {
        ("reference", "the kernels were not asked for")}
    assert sum(call.function == "attention" for call in calls) == 32
    assert sum(call.function == "group_norm_silu" for call in calls) == 61
    assert sum(call.sizes.endswith("SiLU") for call in calls) == 45


def test_the_table_in_the_readme_is_what_the_command_prints():
    pytest.importorskip("triton")
    from bench.coverage import MODELS, column, table

    assert table() in README
    for model in MODELS.values():
        for cell in column(*model).values():
            took, of = cell.split(":")[0].split(" of ")
            assert took == of
