"""A few seconds of every kind of damage; the long run's figures are in tests/README.md."""

import math
from collections import Counter
from pathlib import Path

import damage
import fuzz
import pytest

# How many cases of each kind, and that there are both sorts of outcome where there should be.
SHORT = {"headers": 600, "bodies": 20, "tensors": 16, "prompts": 300, "images": 300, "steps": 30,
         "metadata": 60}  # fmt: skip
ONE_OUTCOME = {"tensors": "refused", "steps": "same", "metadata": "same"}


@pytest.mark.parametrize("kind", fuzz.TARGETS)
def test_a_short_run(kind, tmp_path):
    state = {"seed": 1, "kinds": {}, "wrong": []}
    fuzz.run_kind(state, kind, getattr(damage, kind)(tmp_path), SHORT[kind], seconds=math.inf)
    assert state["wrong"] == []
    rows = state["kinds"][kind]
    assert rows["done"] == rows["same"] + rows["refused"] == SHORT[kind]
    outcomes = {ONE_OUTCOME[kind]} if kind in ONE_OUTCOME else {"same", "refused"}
    assert {outcome for outcome in fuzz.RIGHT if rows[outcome]} == outcomes


def test_the_figures_that_are_kept_are_of_a_complete_run():
    text = (Path(__file__).parent / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    kept = {row[0]: [int(n.replace(",", "")) for n in row[1:6]]
            for row in rows if len(row) == 7 and row[0] in fuzz.TARGETS}  # fmt: skip
    assert {kind: numbers[0] for kind, numbers in kept.items()} == fuzz.TARGETS
    for cases, refused, same, others, different in kept.values():
        assert cases == refused + same and others == different == 0


def test_a_case_is_the_same_again_and_others_are_not(tmp_path):
    case = damage.headers(tmp_path)

    def content(seed, number):
        fuzz.run_case(case, "headers", seed, number)
        return (tmp_path / "a.safetensors").read_bytes()

    assert content(0, 7) == content(0, 7)
    assert len({content(seed, number) for seed in (0, 1) for number in (7, 8)}) == 4


def test_what_is_wrong_is_counted_and_listed(tmp_path, monkeypatch):
    """A reader that lets something pass, and one that raises something else, are both found."""
    def planted(error):
        def refused(*_):
            raise error
        return refused

    state = {"seed": 0, "kinds": {}, "wrong": []}
    monkeypatch.setattr(damage, "read_header", planted(KeyError("x")))
    fuzz.run_kind(state, "headers", damage.headers(tmp_path), 2, seconds=math.inf)
    monkeypatch.undo()
    monkeypatch.setattr(damage, "read_tensor", lambda stored, dtype: 0 * damage.torch.empty(1))
    fuzz.run_kind(state, "headers", damage.headers(tmp_path), 200, seconds=math.inf)
    kinds = Counter(what for _, _, what in state["wrong"])
    assert kinds["KeyError: 'x'"] == 2 and kinds["different"] > 5
    row = fuzz.table(state, "the command").splitlines()[-1]
    assert row.startswith("| headers | 200 |")
    assert row.endswith(f"| 2 | {kinds['different']} | `the command` |")
