"""Every silent constant is tested: with its line mutated, a parity check fails by a wide margin.

traps.py lists the mutations, and why each line is as it is.
"""

import importlib
import inspect
import types

import parity_checks
import pytest
from reference_models import draw_noise_in_float32
from traps import TRAPS

BOUND = 1e-10  # every check stays below it
FACTOR = 1000  # and every mutation exceeds it by this factor

MODULES = {trap.check or trap.module.rpartition(".")[2]: trap.module for trap in TRAPS}
CHECKS = {name: getattr(parity_checks, name, None) or parity_checks.loop(name) for name in MODULES}


@pytest.fixture(autouse=True)
def _noise(monkeypatch):
    draw_noise_in_float32(monkeypatch)


def mutated(name: str, right: str, wrong: str) -> types.ModuleType:
    """minisd's module of that name, executed again from its source with one line mutated."""
    original = importlib.import_module(f"minisd.{name}")
    source = inspect.getsource(original)
    assert source.count(right) == 1, f"{source.count(right)} times in {name}.py: {right!r}"
    module = types.ModuleType(original.__name__)
    module.__package__, module.__file__ = original.__package__, original.__file__
    exec(compile(source.replace(right, wrong), original.__file__, "exec"), module.__dict__)
    return module


@pytest.mark.filterwarnings("ignore:the prompt is")
@pytest.mark.parametrize("check", CHECKS)
def test_without_a_mutation_every_check_passes(check):
    assert CHECKS[check](importlib.import_module(f"minisd.{MODULES[check]}")) <= BOUND


@pytest.mark.filterwarnings("ignore:the prompt is")
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: f"{trap.module}: {trap.wrong}")
def test_a_mutation_is_seen(trap):
    check = CHECKS[trap.check or trap.module.rpartition(".")[2]]
    found = check(mutated(trap.module, trap.right, trap.wrong))
    assert FACTOR * BOUND < found < float("inf"), trap.why
