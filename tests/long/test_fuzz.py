"""A few seconds of every kind of damage; tests/README.md has the counts of a long run."""

import math
from collections import Counter
from pathlib import Path

import damaged_files
import fuzz
import pytest
import torch

# Number of cases of each kind: enough for both outcomes, where both are possible.
SHORT = {"headers": 600, "bodies": 20, "tensors": 16, "prompts": 300, "images": 300, "steps": 30,
         "metadata": 60, "yaml": 300}
ONE_OUTCOME = {"tensors": "rejected", "steps": "same", "metadata": "same"}


@pytest.mark.parametrize("kind", fuzz.TARGETS)
def test_a_short_run(kind, tmp_path):
    state = {"seed": 1, "kinds": {}, "wrong": []}
    fuzz.run_kind(state, kind, fuzz.PREPARE[kind](tmp_path), SHORT[kind], seconds=math.inf)
    assert state["wrong"] == []
    rows = state["kinds"][kind]
    assert rows["done"] == rows["same"] + rows["rejected"] == SHORT[kind]
    outcomes = {ONE_OUTCOME[kind]} if kind in ONE_OUTCOME else {"same", "rejected"}
    assert {outcome for outcome in fuzz.RIGHT if rows[outcome]} == outcomes


def test_the_table_is_of_a_complete_run():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    kept = {row[0]: [int(n.replace(",", "")) for n in row[1:6]]
            for row in rows if len(row) == 7 and row[0] in fuzz.TARGETS}
    assert {kind: numbers[0] for kind, numbers in kept.items()} == fuzz.TARGETS
    for cases, rejected, same, others, different in kept.values():
        assert cases == rejected + same and others == different == 0


def test_a_case_is_reproducible_and_differs_from_others(tmp_path):
    case = damaged_files.headers(tmp_path)

    def content(seed, number):
        fuzz.run_case(case, "headers", seed, number)
        return (tmp_path / "a.safetensors").read_bytes()

    assert content(0, 7) == content(0, 7)
    assert len({content(seed, number) for seed in (0, 1) for number in (7, 8)}) == 4


def test_wrong_cases_are_counted_and_listed(tmp_path, monkeypatch):
    """A reader that accepts a bad file, and one that raises another error, are both found."""
    def raising(error):
        def read(*_):
            raise error
        return read

    state = {"seed": 0, "kinds": {}, "wrong": []}
    monkeypatch.setattr(damaged_files, "read_header", raising(KeyError("x")))
    fuzz.run_kind(state, "headers", damaged_files.headers(tmp_path), 2, seconds=math.inf)
    monkeypatch.undo()
    monkeypatch.setattr(damaged_files, "read_tensor", lambda stored, dtype: torch.zeros(1))
    fuzz.run_kind(state, "headers", damaged_files.headers(tmp_path), 200, seconds=math.inf)
    kinds = Counter(what for _, _, what in state["wrong"])
    assert kinds["KeyError: 'x'"] == 2 and kinds["different"] > 5
    row = fuzz.table(state, "the command").splitlines()[-1]
    assert row.startswith("| headers | 200 |")
    assert row.endswith(f"| 2 | {kinds['different']} | `the command` |")
