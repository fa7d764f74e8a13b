"""The table of mutations names lines that are there."""

from mutants import MUTANTS, ROOT


def test_each_mutation_is_of_one_line():
    for file, _, right, _ in MUTANTS:
        assert (ROOT / "minisd" / f"{file}.py").read_text().count(right) == 1, (file, right)
