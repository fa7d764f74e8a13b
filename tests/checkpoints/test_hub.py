"""Downloads through the real huggingface_hub client, from a small Hub on the loopback address."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from files import save_folder
from reference_models import SMALL
from small_hub import (
    COMMIT,
    READ_BY_MINISD,
    REPOSITORY,
    UNET,
    VAE,
    VAE_CONFIG,
    VAE_LEFT_ALONE,
    VAE_READ,
)

import minisd.checkpoints.hub
from minisd.checkpoints.checkpoint import locate
from minisd.checkpoints.hub import KNOWN, cached, download, is_name, wanted
from minisd.errors import HubError

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


def test_a_name_in_the_cache_is_found_without_the_network(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    save_folder(SMALL, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert locate("owner/name") == snapshot
    with pytest.raises(FileNotFoundError, match="run `minisd download owner/other` first"):
        locate("owner/other")


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


UNCLIP = ["image_encoder/config.json", "image_normalizer/config.json",
          "image_noising_scheduler/scheduler_config.json",
          "feature_extractor/preprocessor_config.json", "image_encoder/model.safetensors",
          "image_normalizer/diffusion_pytorch_model.safetensors"]


def test_an_unclip_model_has_more():
    pickles = ["image_encoder/pytorch_model.bin", "image_normalizer/diffusion_pytorch_model.bin"]
    took = wanted([*SETTINGS, *OTHERS, FULL, *UNCLIP, *pickles])
    assert sorted(took) == sorted(["unet/config.json", *OTHERS, FULL, *UNCLIP])
    with pytest.raises(HubError, match="no safetensors weights for the image_encoder"):
        wanted([*SETTINGS, *OTHERS, FULL, *UNCLIP[:4], UNCLIP[5], *pickles])
    # Another model's encoder is of no use here.
    plain = wanted([*SETTINGS, *OTHERS, FULL, UNCLIP[0], UNCLIP[3], UNCLIP[4]])
    assert sorted(plain) == sorted(["unet/config.json", *OTHERS, FULL])


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


def test_the_depth_estimator_is_fetched_where_there_is_one():
    depth = ["depth_estimator/config.json", "depth_estimator/model.safetensors"]
    others = ["depth_estimator/pytorch_model.bin", "feature_extractor/preprocessor_config.json"]
    without = wanted(SETTINGS + OTHERS + [FULL])
    assert set(wanted(SETTINGS + OTHERS + [FULL] + depth + others)) == {*without, *depth}
    with pytest.raises(HubError, match="no safetensors weights for the depth_estimator"):
        wanted(SETTINGS + OTHERS + [FULL] + depth[:1] + others)


def test_the_second_schedule_of_an_upscaler():
    low_res = "low_res_scheduler/scheduler_config.json"
    assert low_res in wanted(SETTINGS + OTHERS + [FULL, low_res])


def test_no_file_leaves_its_folder():
    strange = ["tokenizer/../../x.json", "tokenizer\\..\\x.json", "x/unet/config.json"]
    assert not set(strange) & set(wanted(SETTINGS + OTHERS + [FULL] + strange))
