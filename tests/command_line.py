"""A run of the command line in this process."""

import io
from contextlib import redirect_stderr, redirect_stdout

from minisd.app.cli import main


def run(argv: list[str]) -> tuple[int, str, str]:
    """Its exit code, and what it printed on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def fails(argv: list[str], code: int, *words: str) -> None:
    """Run; expect the exit code, and one line on stderr that contains the words."""
    ended, out, err = run(argv)
    assert (ended, out) == (code, "")
    assert err.startswith("minisd: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
