"""Downloads through the real huggingface_hub client, from a small Hub on the loopback address."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import minisd.checkpoints.hub
from minisd.checkpoints.hub import KNOWN, cached, download, is_name, wanted
from minisd.errors import HubError

REPOSITORY = "owner/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"

READ_BY_MINISD = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
    "scheduler/scheduler_config.json": b"{}",
    "text_encoder/config.json": b'{"text": 1}',
    "text_encoder/model.fp16.safetensors": b"half a text encoder",
    "tokenizer/merges.txt": b"#version: 0.2\n",
    "tokenizer/special_tokens_map.json": b'{"special": 1}',
    "tokenizer/tokenizer_config.json": b'{"config": 1}',
    "tokenizer/vocab.json": b'{"a": 0}',
    "unet/config.json": b'{"unet": 1}',
    UNET: bytes(range(256)) * 2000,
    "vae/config.json": b'{"vae": 1}',
    VAE: b"vae weights" * 1000,
}
LEFT_ALONE = {
    ".gitattributes": b"*.bin lfs",
    "README.md": b"# Model",
    "feature_extractor/preprocessor_config.json": b"{}",
    "safety_checker/config.json": b'{"safety": 1}',
    "safety_checker/model.safetensors": b"safety",
    "text_encoder/pytorch_model.bin": b"pickle",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half a unet",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"the other weights",
    "v1-5-pruned-emaonly.ckpt": b"pickle",
    "v1-5-pruned-emaonly.safetensors": b"single file",
}


# A repository with a VAE alone.
VAE_CONFIG = b'{"_class_name": "AutoencoderKL"}'
VAE_READ = {"config.json": VAE_CONFIG, "diffusion_pytorch_model.safetensors": b"a vae" * 1000}
VAE_LEFT_ALONE = {
    "README.md": b"# VAE", "diffusion_pytorch_model.bin": b"pickle", "vae.ckpt": b"pickle",
    "diffusion_pytorch_model.fp16.safetensors": b"half a vae", "vae.safetensors": b"single file",
    "tokenizer/vocab.json": b"{}",
}


class Hub(ThreadingHTTPServer):
    """One repository, served like the Hub does, with the faults that a test sets."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {**READ_BY_MINISD, **LEFT_ALONE}
        self.status = {}  # path of a request -> the error status it gets
        self.cut_once = set()  # files whose first answer stops half-way
        self.requests = []  # (method, path of the request, its Range header)
        self.token = None  # if set, the one that a gated repository is given to

    def fetched(self) -> set[str]:
        prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
        gets = {path for method, path, _ in self.requests if method == "GET"}
        return {path.removeprefix(prefix) for path in gets if path.startswith(prefix)}


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers["Range"]))
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        api, resolve = f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/resolve/{COMMIT}/"
        if path in hub.status:
            code = {401: "RepoNotFound", 403: "GatedRepo"}.get(hub.status[path], "Other")
            self._answer(hub.status[path], b"{}", {"X-Error-Code": code})
        elif path in (api, f"{api}/revision/main"):
            self._answer(200, json.dumps(self._info()).encode(), {})
        elif path == f"{api}/tree/{COMMIT}":
            rows = [
                {"type": "file", "path": row["rfilename"], "oid": row["blobId"], **row}
                for row in self._info()["siblings"]
            ]
            self._answer(200, json.dumps(rows).encode(), {})
        elif path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
            self._file(path.removeprefix(resolve))
        else:
            self._answer(404, b"{}", {})

    def _info(self):
        """The Hub publishes the sha256 of large files (here: the weights), and the size of all."""
        siblings = []
        for name, body in self.server.files.items():
            row = {"rfilename": name, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(body).hexdigest()
                row["lfs"] = {"size": len(body), "sha256": digest, "oid": digest, "pointerSize": 1}
            siblings.append(row)
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}

    def _file(self, name):
        body, status = self.server.files[name], 200
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        cut = self.command == "GET" and name in self.server.cut_once
        self.server.cut_once -= {name} if cut else set()
        self._answer(status, body, headers, send=len(body) // 2 if cut else None)

    def _answer(self, status, body, headers, send=None):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])
        self.close_connection = send is not None

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


PROGRAM = """
import json, sys
from minisd.checkpoints import hub
lines, result = [], {}
try:
    result["folder"] = str(hub.download(sys.argv[1], log=lines.append))
except hub.HubError as error:
    result["error"] = str(error)
cached = hub.cached(sys.argv[1])
print(json.dumps({"lines": lines, "cached": cached and str(cached), **result}))
"""


def _python(*line, **environment) -> str:
    """What a new process prints: huggingface_hub reads the environment when it is imported."""
    root = str(Path(minisd.checkpoints.hub.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root} | environment
    command = [sys.executable, *line]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def here(hub, tmp_path):
    """The environment in which this Hub is the only one."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}


@pytest.fixture
def run(here):
    """Download ``REPOSITORY`` in a new process; return what it returned, logged or raised."""

    def download(**environment):
        return json.loads(_python("-c", PROGRAM, REPOSITORY, **here | environment))

    return download


def _files(folder: str | Path) -> dict[str, bytes]:
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_fetches_what_minisd_reads_and_no_more(hub, run):
    result = run()
    assert _files(result["folder"]) == READ_BY_MINISD
    assert hub.fetched() == set(READ_BY_MINISD)
    # It logs the revision, and the files in the format of the command sha256sum.
    assert result["lines"][0] == f"{REPOSITORY} at revision {COMMIT}"
    assert sorted(result["lines"][1:]) == sorted(
        f"{hashlib.sha256(body).hexdigest()}  {name}" for name, body in READ_BY_MINISD.items()
    )


def test_a_cut_connection_is_resumed_where_it_stopped(hub, run):
    # The client keeps what arrived in pieces of 10 MiB: of the 12 sent before the cut, 10.
    hub.files[UNET] = bytes(24 << 20)
    hub.cut_once = {UNET}
    assert _files(run()["folder"])[UNET] == hub.files[UNET]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and UNET in path]
    assert ranges == [None, f"bytes={10 << 20}-"]


def test_a_second_call_fetches_only_what_is_missing(hub, run, tmp_path):
    hub.status = {f"/{REPOSITORY}/resolve/{COMMIT}/{VAE}": 400}
    result = run()
    assert result["error"].startswith(f"{REPOSITORY} was not downloaded, run it again to go on (")
    assert result["cached"] is None
    # The client stops at the first error, so how much had arrived by then may vary.
    arrived = set(_files(tmp_path / "hub" / "models--owner--model" / "snapshots" / COMMIT))
    hub.status, hub.requests = {}, []
    assert _files(run()["folder"]) == READ_BY_MINISD
    assert hub.fetched() == set(READ_BY_MINISD) - arrived >= {VAE, "model_index.json"}


def test_nothing_is_fetched_twice_and_cached_finds_it(hub, run):
    first = run()
    assert first["cached"] == first["folder"]
    hub.requests = []
    assert run()["folder"] == first["folder"]
    assert hub.fetched() == set()


def test_a_damaged_file_is_named_and_replaced(run):
    stored = (Path(run()["folder"]) / UNET).resolve()
    stored.write_bytes(b"damaged")
    assert run()["error"] == f"{REPOSITORY} is damaged: delete {stored} and run it again"
    stored.unlink()
    assert _files(run()["folder"]) == READ_BY_MINISD


@pytest.mark.parametrize(
    "status, words",
    [
        (401, "does not exist on the Hub, or it is private"),
        (403, "is gated: accept its terms"),
        (400, "was not downloaded, run it again to go on (BadRequestError: "),
    ],
)
def test_errors_of_the_server(status, words, hub, run, tmp_path):
    hub.status = {f"/api/models/{REPOSITORY}": status}
    result = run()
    assert result["error"].startswith(f"{REPOSITORY} {words}") and "\n" not in result["error"]
    assert _files(tmp_path) == {}


def test_the_advice_for_a_gated_repository_helps(hub, run):
    hub.token = "hf_abc"
    advice = re.search(r"then set (\w+) to a token", run()["error"])
    assert run(**{advice[1]: "hf_abc"})["cached"]


@pytest.mark.parametrize("code", ["ENOSPC", "EACCES", "EROFS"])
def test_a_cache_that_cannot_be_written_is_no_reason_to_run_it_again(monkeypatch, code):
    error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "/cache/x")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(HubError) as caught:
        download(REPOSITORY)
    assert str(caught.value) == f"{REPOSITORY} was not downloaded: {error.strerror}: /cache/x"


# --- a VAE alone ----------------------------------------------------------------------------------


def test_a_vae_is_fetched_and_found(hub, run, tmp_path):
    hub.files = VAE_READ | VAE_LEFT_ALONE
    result = run()
    assert _files(result["folder"]) == VAE_READ and result["cached"] == result["folder"]
    assert result["lines"][0] == f"{REPOSITORY} at revision {COMMIT}"
    assert {line.split("  ")[1] for line in result["lines"][1:]} == set(VAE_READ)
    hub.requests = []
    assert run()["folder"] == result["folder"]
    assert hub.fetched() == set()
    assert run(HF_HUB_OFFLINE="1")["cached"] == result["folder"]


@pytest.mark.parametrize("forms", [
    ["diffusion_pytorch_model.fp16.safetensors"],
    ["diffusion_pytorch_model-00001-of-00001.safetensors",
     "diffusion_pytorch_model.safetensors.index.json"],
])
def test_a_vae_in_other_forms(hub, run, forms):
    hub.files = {"config.json": VAE_CONFIG, **dict.fromkeys(forms, b"{}")}
    result = run()
    assert _files(result["folder"]) == hub.files and result["cached"]


def test_a_vae_is_whole_or_not_found(hub, run, here):
    hub.files = dict(VAE_READ)
    hub.status = {f"/{REPOSITORY}/resolve/{COMMIT}/diffusion_pytorch_model.safetensors": 400}
    assert "run it again to go on" in (result := run())["error"] and result["cached"] is None
    # Another program, which fetches the config first, was interrupted.
    line = "from huggingface_hub import snapshot_download as fetch"
    line += f"; print(fetch({REPOSITORY!r}, allow_patterns=['config.json']))"
    assert set(_files(_python("-c", line, **here).strip())) == {"config.json"}
    assert run()["cached"] is None
    hub.status = {}
    assert _files(run()["folder"]) == VAE_READ


@pytest.mark.parametrize("files, words", [
    ({"config.json": b'{"_class_name": "ControlNetModel"}'}, "has the _class_name 'ControlNetMod"),
    ({"config.json": b'{"_class_name": "AutoencoderTiny"}'}, "has the _class_name 'AutoencoderTi"),
    ({"config.json": b'{"architectures": ["CLIPTextModel"]}'}, "has the _class_name None"),
    ({"config.json": b"<html>"}, "has the _class_name None"),
    ({"config.json": b"[" * 100_000}, "has the _class_name None"),
    ({"config.json": b'["AutoencoderKL"]'}, "has the _class_name None"),
    ({"config.json": b'{"_class_name": {"a": "\\n"}}'}, "has the _class_name {'a': "),
    ({"diffusion_pytorch_model.safetensors": None, "diffusion_pytorch_model.bin": b"pickle"},
     "no safetensors weights for the vae"),
    ({"config.json": None}, "no config.json, so it is no VAE either"),
])
def test_what_is_no_vae_is_not_fetched(hub, run, tmp_path, files, words):
    hub.files = {name: body for name, body in (VAE_READ | files).items() if body is not None}
    result = run()
    assert words in result["error"] and "\n" not in result["error"]
    assert "has no model_index.json" in result["error"] and result["cached"] is None
    assert not list(tmp_path.rglob("snapshots/*/*"))


def test_no_connection(hub, run):
    hub.server_close()  # the port no longer answers
    assert "was not downloaded, run it again to go on (Connect" in run()["error"]


def test_offline_asks_nothing(hub, run):
    online = run()
    hub.requests = []
    result = run(HF_HUB_OFFLINE="1")
    assert result["error"].startswith(f"{REPOSITORY} was not downloaded: HF_HUB_OFFLINE is set")
    assert result["cached"] == online["folder"]
    assert hub.requests == []


def test_importing_is_cheap():
    line = "import sys, minisd.checkpoints.hub; print('huggingface_hub' in sys.modules)"
    assert _python("-c", line) == "False\n"


@pytest.mark.parametrize("name", ["v1-5.safetensors", "/models/x", "a--b/c", "../x", "", "a/b/c",
                                  "a/b..c", "./x", "a/.b", "a/b.git", "a/" + "b" * 200, "~/x"])
def test_cached_takes_any_string(name):
    assert cached(name) is None and not is_name(name)


def test_names():
    with pytest.raises(HubError, match="unknown model 'sd3': known are sd1.4, sd1.5, sd2.1, "):
        download("sd3")
    assert all(len(repository.split("/")) == 2 for repository in KNOWN.values())


# --- which files ----------------------------------------------------------------------------------

SETTINGS = ["model_index.json", "unet/config.json"]
OTHERS = ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
STEM = "unet/diffusion_pytorch_model"
SHARDS = [
    f"{STEM}-00001-of-00002.safetensors",
    f"{STEM}-00002-of-00002.safetensors",
    f"{STEM}.safetensors.index.json",
]
HALF_SHARDS = [f"{STEM}.fp16-00001-of-00001.safetensors", f"{STEM}.safetensors.index.fp16.json"]
HALF, FULL = f"{STEM}.fp16.safetensors", f"{STEM}.safetensors"


@pytest.mark.parametrize(
    "there, taken",
    [
        ([HALF, FULL, *SHARDS], [FULL]),
        ([HALF, *SHARDS], SHARDS),
        ([HALF, f"{STEM}.bin", f"{STEM}.non_ema.safetensors"], [HALF]),
        (HALF_SHARDS, HALF_SHARDS),
    ],
)
def test_one_set_of_weights(there, taken):
    assert set(wanted(SETTINGS + OTHERS + there)) == {"unet/config.json", *OTHERS, *taken}


@pytest.mark.parametrize(
    "files, words",
    [
        ([*OTHERS, FULL], "no model_index.json"),
        ([*SETTINGS, *OTHERS], "no safetensors weights for the unet"),
        ([*SETTINGS, *OTHERS, f"{STEM}.bin"], "no safetensors weights for the unet"),
    ],
)
def test_repositories_that_minisd_cannot_read(files, words):
    with pytest.raises(HubError, match=words):
        wanted(files)


def test_no_file_leaves_its_folder():
    strange = ["tokenizer/../../x.json", "tokenizer\\..\\x.json", "x/unet/config.json"]
    assert not set(strange) & set(wanted(SETTINGS + OTHERS + [FULL] + strange))
