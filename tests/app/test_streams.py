"""Every command with output streams that are missing, closed, odd, full, or that nobody reads."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image
from small_hub import COMMIT, REPOSITORY, Hub

import minisd
from minisd.app import streams
from minisd.app.cli import main
from minisd.app.png import read_settings, save
from minisd.errors import HubError

HEART = ["a heart 愛 zzqx", "--steps", "1", "--seed", "0", "--overwrite", "-o", "heart.png"]
LINES = [["words"], ["info", "a.png"], ["info", "none.png"], ["download", "sd3"], HEART, ["--help"],
         ["--version"], ["info", "--help"], ["x", "--steps", "0"], ["--debug", "x", "-o", "x.jpg"],
         ["download", "owner/name"]]


class OnlyWrites:
    """All that print() asks of a stream."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def unread():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


STREAMS = {"None": lambda: None, "closed": closed, "only write": OnlyWrites, "unread": unread,
           "ASCII": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"), "text": io.StringIO}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Image.new("RGB", (1, 1)), "a.png", {"prompt": "愛 \udcff"})

    def download(name, log):
        if name == "sd3":
            raise HubError("no such model")
        log("a line 愛")
        return Path("folder")

    monkeypatch.setattr("minisd.checkpoints.hub.download", download)
    return tmp_path


def code_of(line) -> int:
    try:
        return main(line)
    except SystemExit as ended:  # --help and --version
        return ended.code


def expected(line) -> int:
    codes = {"none.png": 3, "sd3": 3, "0": 2, "x.jpg": 2}
    return codes.get(line[-1], 0)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_every_command_with_every_stream(folder, monkeypatch, line, kind):
    out, err = STREAMS[kind](), STREAMS[kind]()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert code_of(line) == expected(line)
    if before and line is not HEART:  # libraries keep some open
        assert len(os.listdir("/proc/self/fd")) == before
    if line is HEART:
        assert read_settings("heart.png")["prompt"] == HEART[0]
    monkeypatch.undo()
    for stream in (out, err):
        if kind == "unread":
            stream.close()  # what was left in its buffer is gone without an error


def test_stderr_is_not_sent_to_stdout(folder, monkeypatch, capsys):
    """print(file=None) would."""
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["download", "owner/name"]) == 0
    assert main(["info", "none.png", "--debug"]) == 3
    assert capsys.readouterr().out == "folder\n"


def test_messages_go_to_a_terminal_as_one(monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

        def fileno(self):
            return 2

    shown = Terminal()
    stream = streams.Tolerant(shown)
    assert (stream.isatty(), stream.fileno(), stream.encoding) == (True, 2, "utf-8")
    assert stream.write("a") == 1 and shown.getvalue() == "a"
    for missing in (None, closed()):
        stream = streams.Tolerant(missing)
        assert not stream.isatty() and stream.write("a") == 1
        with pytest.raises(OSError):
            stream.fileno()


def test_what_a_stream_cannot_encode_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    streams.say("愛 \udcff\n", out)
    assert out.buffer.getvalue() == b"\\u611b \\udcff\n"


@pytest.mark.parametrize("stderr", [None, closed(), OnlyWrites()], ids=["None", "closed", "odd"])
@pytest.mark.parametrize("progress", [None, True, False])
def test_a_call_draws_without_a_stream_for_its_bar(monkeypatch, stderr, progress):
    sd = minisd.load(device="cpu")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert sd("a red heart", num_inference_steps=1, seed=0, progress=progress).images


# As processes


def shell(line: str, folder: Path, **environment) -> subprocess.CompletedProcess:
    root = str(Path(minisd.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get(
        "PYTHONPATH", "")]), "MINISD": f"{sys.executable} -m minisd"} | environment
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, timeout=300,
                          capture_output=True, text=True)


DRAW = "$MINISD 'a red heart zzqx' --steps 1 --seed 0 -o heart.png"


@pytest.mark.skipif(os.name != "posix", reason="bash")
@pytest.mark.parametrize("line, code", [
    (f"{DRAW} <&- >&- 2>&-", 0),
    (f"{DRAW} | true; exit ${{PIPESTATUS[0]}}", 0), (f"{DRAW} 2>/dev/full", 0),
    ("$MINISD words >&- 2>&-", 0), ("$MINISD words | true; exit ${PIPESTATUS[0]}", 0),
    ("$MINISD --help | true; exit ${PIPESTATUS[0]}", 0), ("$MINISD --help >&-", 0),
    ("$MINISD info none.png 2>&-", 3), ("$MINISD x --steps 0 2>/dev/full", 2),
    ("$MINISD words 2>&1 >/dev/full", 5), ("$MINISD --version 2>&1 >/dev/full", 5),
])
def test_closed_and_full_descriptors(tmp_path, line, code):
    done = shell(line, tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout and "Exception" not in done.stderr
    if code == 5:
        assert done.stdout == "minisd: error: <stdout>: No space left on device\n"
    if "heart.png" in line:
        assert read_settings(tmp_path / "heart.png")["seed"] == 0
        Image.open(tmp_path / "heart.png").load()


@pytest.mark.skipif(os.name != "posix", reason="bash")
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """Or what C code says of an error would be written into an image."""
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    streams.open_missing()  # nothing is missing here
    again = os.open(os.devnull, os.O_RDONLY)
    os.close(again)
    assert again == free
    program = ("import sys, os; from minisd.app.cli import main; sys.argv = ['minisd', 'words'];"
               "main(); print(os.open(os.devnull, os.O_RDONLY), file=open('number', 'w'))")
    assert shell(f'{sys.executable} -c "{program}" <&- >&- 2>&-', tmp_path).returncode == 0
    assert int((tmp_path / "number").read_text()) > 2


FROM_PYTHON = f"""{sys.executable} -c 'import sys, minisd
%s
print(minisd.download(sys.argv[1]))
from huggingface_hub.utils import are_progress_bars_disabled
assert not are_progress_bars_disabled()'"""


@pytest.mark.skipif(os.name != "posix", reason="bash")
@pytest.mark.parametrize("line", [
    "$MINISD download {} >&- 2>&-", "$MINISD download {} 2>/dev/full",
    "$MINISD download {} 2>&1 | true; exit ${{PIPESTATUS[0]}}",
    FROM_PYTHON % "sys.stderr = None" + " {}", FROM_PYTHON % "sys.stderr.close()" + " {}",
])
def test_a_download_needs_no_streams(hub: Hub, tmp_path, line):
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = shell(line.format(REPOSITORY), tmp_path, **here)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / COMMIT
    assert json.loads((snapshot / "model_index.json").read_text())
