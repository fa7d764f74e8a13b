"""A run of the command line that must fail."""

from minisd.app.cli import main


def one_line(capsys) -> str:
    """The error that it printed: one line on stderr, and nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minisd: error: ") and err.count("\n") == 1, err
    return err


def fails(capsys, argv: list[str], code: int, *words: str) -> None:
    """Run; expect the exit code, and one line on stderr that contains the words."""
    assert main(argv) == code
    err = one_line(capsys)
    for word in words:
        assert word in err
