"""A small Hub on the loopback address: one repository, and the faults that a test sets."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

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
