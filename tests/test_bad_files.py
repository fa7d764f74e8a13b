"""A bad file gets one WeightError that names it and says why, before any weight is read."""

import json
import os
import pickle
import random
import shutil
import struct
import zipfile

import pytest
import torch
from files import (
    all_shapes,
    as_single_file,
    header,
    official_modules,
    random_modules,
    save,
    save_folder,
    write,
)
from oracles import SMALL
from safetensors import SafetensorError, safe_open

from minisd.checkpoint import WeightError, check, fill, open_checkpoint
from minisd.config import SD1
from minisd.safetensors_file import MAX_HEADER, read_header, read_tensor

UNET = "model.diffusion_model."
ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


def framed(head: bytes, data: bytes = bytes(8)) -> bytes:
    return struct.pack("<Q", len(head)) + head + data


def rows(**tensors) -> bytes:
    return framed(json.dumps(tensors).encode(), bytes(12))


GOOD = rows(a=ROW, b=NEXT)
PICKLED = pickle.dumps({"state_dict": 1})
HTML = b"\n<!DOCTYPE html><html><body>Sign in to download</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"

# First bytes and headers: file content, what the error says.
BAD = {
    "empty": (b"", "0 bytes.*interrupted download"),
    "7 bytes": (bytes(7), "7 bytes.*interrupted download"),
    "header cut": (GOOD[:40], r"ends at byte \d+.*has only 40: interrupted"),
    "data cut": (GOOD[:-1], r"should have \d+ bytes and has \d+: interrupted"),
    "trailing byte": (GOOD + b"x", r"should have \d+ bytes and has \d+: interrupted"),
    "LFS pointer": (LFS, "Git LFS pointer.*git lfs pull"),
    "web page": (HTML, "a web page"),
    "pickle": (PICKLED, "a PyTorch pickle: .*save_file"),
    "old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99), "a PyTorch pickle: "),
    "zip": (b"PK\x03\x04" + bytes(99), "pickle in a zip: .*save_file"),
    "GGUF": (b"GGUF" + bytes(99), "GGUF"),
    "length 2^63": (struct.pack("<Q", 2**63) + GOOD[8:], "header of 9223372036854775808 bytes"),
    "length 2^64 - 1": (b"\xff" * 8 + GOOD[8:], "header of 18446744073709551615 bytes"),
    "length over the limit": (struct.pack("<Q", MAX_HEADER + 1) + b"{", "at most"),
    "length 0": (framed(b""), "not a safetensors file"),
    "not UTF-8": (framed(b'{"\xff": 1}'), "not readable JSON"),
    "not JSON": (framed(b"{'a': 1}"), "not readable JSON"),
    "JSON cut": (framed(b'{"a": '), "not readable JSON"),
    "two JSONs": (framed(b"{}{}", b""), "not readable JSON"),
    "deep nesting": (framed(b'{"a":' * 100_000), "not readable JSON"),
    "long number": (framed(b'{"a": ' + b"9" * 9999 + b"}"), "not readable JSON"),
    "an array": (framed(b"[1]"), "not begin with '{'"),
    "leading space": (framed(b' {"a": 1}'), "not begin with '{'"),
    "name twice": (framed(b'{"a": 1, "b": 2, "a": 1}'), "has 'a' twice"),
    "field twice": (framed(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "has 'dtype' twice"),
    "NUL in a name": (rows(**{"a\0b": ROW}), r"'a\\x00b' cannot be the name"),
    "surrogate in a name": (rows(**{"\ud800": ROW}), "cannot be the name"),
    "../ in a name": (rows(**{"../a": ROW}), "'../a' cannot be the name"),
    "/ in a name": (rows(**{"a/b": ROW}), "'a/b' cannot be the name"),
    "row of another type": (rows(a=[1]), "a needs a dtype, a shape and two offsets"),
    "field missing": (rows(a={"dtype": "F32", "shape": [2]}), "a needs a dtype"),
    "field too many": (rows(a=ROW | {"x": 1}), "a needs a dtype"),
    "unknown dtype": (rows(a=ROW | {"dtype": "F33"}), "unknown dtype 'F33'"),
    "dtype of another type": (rows(a=ROW | {"dtype": ["F32"]}), "unknown dtype"),
    "shape [0, 2^63-1]": (rows(a=ROW | {"shape": [0, 2**63 - 1]}), "impossible shape"),
    "negative size": (rows(a=ROW | {"shape": [-2]}), "impossible shape"),
    "fraction": (rows(a=ROW | {"shape": [2.0]}), "impossible shape"),
    "truth value": (rows(a=ROW | {"shape": [True, 2]}), "impossible shape"),
    "rank 100": (rows(a=ROW | {"shape": [2] + [1] * 99}), "impossible shape"),
    "one offset": (rows(a=ROW | {"data_offsets": [0]}), "impossible offsets"),
    "negative offset": (rows(a=ROW | {"data_offsets": [-8, 0]}), "impossible offsets"),
    "offset 2^64": (rows(a=ROW | {"data_offsets": [2**64, 2**64 + 8]}), "impossible offsets"),
    "size and shape": (rows(a=ROW | {"shape": [3]}), "which is not 8 bytes"),
    "backwards": (rows(a=ROW | {"data_offsets": [8, 0]}), "which is not -8 bytes"),
    "overlap": (rows(a=ROW, b=NEXT | {"data_offsets": [4, 8]}), "b begins at byte"),
    "gap": (rows(a=ROW, b=NEXT | {"data_offsets": [9, 13]}), "b begins at byte"),
    "beyond the end": (rows(a=ROW, b=ROW | {"data_offsets": [8, 16]}), "should have"),
    "100,000 tensors": (
        framed(json.dumps({f"{i:x}": 0 for i in range(100_000)}).encode()), "100000 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damaged_and_foreign_files(case, tmp_path):
    content, message = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_zipped_pickle_of_torch_is_never_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    assert zipfile.is_zipfile(path)
    with pytest.raises(WeightError, match="pickle in a zip"):
        open_checkpoint(path)


def test_absurd_header_length_of_a_huge_file_is_not_read(tmp_path):
    path = write(tmp_path / "big.safetensors", b"{", 2**40)  # sparse, but reading it would not end
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 2**39))
    with pytest.raises(WeightError, match="header of 549755813888 bytes"):
        read_header(path)


def test_what_the_format_allows_is_read(tmp_path):
    head = json.dumps({"__metadata__": {"format": "pt"}, "b": NEXT, "a": ROW, "c": {
        "dtype": "I64", "shape": [0, 5], "data_offsets": [12, 12]}}).encode() + b"   "  # fmt: skip
    path = tmp_path / "a"
    path.write_bytes(framed(head, struct.pack("<3f", 1, 2, 3)))
    tensors = read_header(path)
    assert {name: t.shape for name, t in tensors.items()} == {"b": (1,), "a": (2,), "c": (0, 5)}
    assert read_tensor(tensors["a"], torch.float32).tolist() == [1, 2]
    assert read_tensor(tensors["b"], torch.float64).tolist() == [3]


def test_of_mutated_headers_none_is_read_differently_than_by_safetensors(tmp_path):
    assert mutate(tmp_path / "a", 1000) == {"refused", "same"}


def mutate(path, times: int, seed: int = 0) -> set[str]:
    """Damage a good header in a random place, time and again; what became of the files."""
    draw, outcomes = random.Random(seed), set()
    for _ in range(times):
        data = bytearray(GOOD)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data) - 12)
            piece = draw.choice([b'"', b"{", b"}", b"[", b"]", b",", b"0", b"9", b"-", b"a", b" ",
                                 b"\\", b"\0", b"\xff", bytes([draw.randrange(256)])])  # fmt: skip
            data[place : place + draw.randint(0, 2)] = piece
        path.write_bytes(data)
        outcomes.add(outcome(path))
    return outcomes


def outcome(path) -> str:
    try:
        ours = {name: (t.dtype, list(t.shape)) for name, t in read_header(path).items()}
        values = {n: read_tensor(t, torch.float32) for n, t in read_header(path).items()}
    except WeightError:
        return "refused"
    try:
        with safe_open(path, "pt") as file:
            theirs = {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape())
                      for n in file.keys()}  # fmt: skip
            same = all(torch.equal(file.get_tensor(n).float(), values[n]) for n in theirs)
    except SafetensorError as error:
        return f"only ours reads it: {error}"
    return "same" if ours == theirs and same else "different"


# Tensors that do not fit.


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return official_modules(SD1)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """An official checkpoint, by its header alone."""
    path = tmp_path_factory.mktemp("sd1") / "sd1.safetensors"
    return write(path, header(all_shapes(SD1)))


USED = [name for name in all_shapes(SD1) if not name.endswith("position_ids")]
EDITS = {
    "dropped": lambda shapes, name: {n: s for n, s in shapes.items() if n != name},
    "renamed": lambda shapes, name: {n + "x" * (n == name): s for n, s in shapes.items()},
    "reshaped": lambda shapes, name: shapes | {name: (*shapes[name], 1, 2)},
}


def refusal(path, modules) -> str:
    try:
        found = open_checkpoint(path)
        for part, module in modules.items():
            check(found, part, module)
    except WeightError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("edit", [*EDITS, "retyped"])
@pytest.mark.parametrize("name", [*USED[::97], *(n for n in USED if "input_blocks.0.0." in n)])
def test_every_tensor_is_needed_under_its_name_in_its_shape_and_dtype(
    name, edit, full_size, tmp_path
):
    path, shapes = tmp_path / "a.safetensors", all_shapes(SD1)
    message = refusal(write(path, damaged(shapes, name, edit)), full_size)
    assert name in message and str(path) in message


def damaged(shapes, name, edit):
    if edit != "retyped":
        return header(EDITS[edit](shapes, name))
    rows = header({n: s for n, s in shapes.items() if n != name})
    end = max(row["data_offsets"][1] for row in rows.values())
    odd = header({name: shapes[name]}, "I8")[name]
    odd["data_offsets"] = [end, end + odd["data_offsets"][1]]
    return rows | {name: odd}


def test_error_counts_and_names_the_first(full_size, tmp_path):
    shapes = {name.replace("resnets", "x").replace(".attn2.", ".attn9."): shape
              for name, shape in all_shapes(SD1).items() if ".attn1.to_q" not in name}  # fmt: skip
    shapes[UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = (320, 768)
    message = refusal(write(tmp_path / "a", header(shapes)), full_size)
    assert f"unet: 95 missing: {UNET}input_blocks.1.1.transformer_blocks.0" in message
    assert f"; 80 unexpected: {UNET}input_blocks.1.1" in message
    assert message.count("attn") <= 11 and message.count(", ...") == 2


def test_tensor_of_no_part_is_refused(tmp_path):
    path = write(tmp_path / "a", header(all_shapes(SD1) | {"stranger": (1,)}))
    with pytest.raises(WeightError, match="1 unexpected: stranger"):
        open_checkpoint(path)


OTHERS = {
    "LoRA": {"lora_unet_down_blocks_0_x.lora_down.weight": (1,)},
    "LoRA ": {"unet.down_blocks.0.attn1.to_q.lora.down.weight": (1,)},
    "LoRA  ": {"base_model.model.to_q.lora_A.weight": (1,)},
    "SDXL": {"conditioner.embedders.1.model.ln_final.weight": (1280,)},
    "SDXL refiner": {"conditioner.embedders.0.model.ln_final.weight": (1280,), UNET + "x": (1,)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "ControlNet ": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    "unCLIP": {UNET + "label_emb.0.0.weight": (1280, 2048), "noise_augmentor.a": (1,)},
    "instruct-pix2pix": {UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)},
    "depth": {UNET + "input_blocks.0.0.weight": (320, 5, 3, 3)},
    "x4 upscaler": {UNET + "input_blocks.0.0.weight": (256, 7, 3, 3)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (1,)},
    "Flux ": {"single_transformer_blocks.0.proj_out.weight": (1,)},
    "UNet alone": {"time_embedding.linear_1.weight": (1280, 320)},
    "VAE alone": {"decoder.conv_in.weight": (512, 4, 3, 3)},
    "text encoder alone": {"text_model.embeddings.token_embedding.weight": (49408, 768)},
    "stranger": {"stranger": (1,)},
    "unusual": {UNET + "input_blocks.0.0.weight": (64, 4, 3, 3)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_refused_by_name(kind, tmp_path):
    path = write(tmp_path / "a.safetensors", header(OTHERS[kind]))
    words = {"unusual": "input_blocks.0.0.weight.*give config="}
    with pytest.raises(WeightError, match=words.get(kind, kind.strip())):
        open_checkpoint(path)


# Values.


@pytest.fixture
def small(tmp_path):
    def make(**changes):
        tensors = as_single_file(SMALL, random_modules(SMALL))
        for name, change in changes.items():
            tensors[name] = change(tensors[name])
        return save(tmp_path / "a.safetensors", tensors)

    return make


def put(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weight_that_is_not_finite(value, small):
    name = "model.diffusion_model.out.2.weight"
    found = open_checkpoint(small(**{name: put(value)}), config=SMALL)
    with pytest.raises(WeightError, match=f"{name} has NaN or infinity"):
        fill(found, "unet", meta()["unet"], torch.float32, torch.device("cpu"))


def test_weight_too_large_for_half_precision(small):
    found = open_checkpoint(small(**{"first_stage_model.quant_conv.bias": put(1e5)}), config=SMALL)
    fill(found, "vae", meta()["vae"], torch.float32, torch.device("cpu"))
    with pytest.raises(WeightError, match="quant_conv.bias has NaN or inf.*read as torch.float16"):
        fill(found, "vae", meta()["vae"], torch.float16, torch.device("cpu"))


def test_file_cut_short_after_it_was_checked(small):
    path = small()
    found = open_checkpoint(path, config=SMALL)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WeightError, match="ended within"):
        for part, module in meta().items():
            fill(found, part, module, torch.float32, torch.device("cpu"))


def meta():
    with torch.device("meta"):
        return official_modules(SMALL)


# Paths and folders.


def test_missing_path_names_what_is_near(tmp_path):
    (tmp_path / "v1-5-pruned.safetensors").touch()
    (tmp_path / "readme").touch()
    with pytest.raises(FileNotFoundError, match=r"v1-5-prunde.safetensors.*has v1-5-pruned.safet"):
        open_checkpoint(tmp_path / "v1-5-prunde.safetensors")
    with pytest.raises(FileNotFoundError, match="has readme, v1-5-pruned.safetensors"):
        open_checkpoint(tmp_path / "0")


def test_folder_without_an_index(tmp_path):
    with pytest.raises(WeightError, match="no model_index.json.*beside text_encoder, unet, vae"):
        open_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_folder(SMALL, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


MANY = 10**18
# File, fields that are put there, what the error says.
BAD_FIELDS = [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "_class_name is 'Stable"),
    ("model_index.json", {"_class_name": ["x"]}, "_class_name"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is .*AutoencoderTiny"),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
    ("unet/config.json", {"in_channels": 8}, "instruct-pix2pix"),
    ("unet/config.json", {"in_channels": 7}, "x4 upscaler"),
    ("unet/config.json", {"in_channels": 5}, "depth"),
    ("unet/config.json", {"in_channels": 6}, "6 input channels"),
    ("unet/config.json", {"out_channels": 8}, "8 output channels"),
    ("unet/config.json", {"block_out_channels": [MANY] * 3}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [16] * 99}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [16, 24, 45]}, "norm_num_groups"),
    ("unet/config.json", {"block_out_channels": "16"}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [16, 24]}, "up_block_types"),
    ("unet/config.json", {"down_block_types": ["DownBlock2D", "K", "DownBlock2D"]}, "down_block"),
    ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D"] * 3}, "up_block_types"),
    ("unet/config.json", {"layers_per_block": MANY}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": 2.0}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": True}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": None}, "layers_per_block"),
    ("unet/config.json", {"attention_head_dim": 7}, "attention_head_dim"),
    ("unet/config.json", {"attention_head_dim": 0}, "attention_head_dim"),
    ("unet/config.json", {"attention_head_dim": [2, 3]}, "attention_head_dim"),
    ("unet/config.json", {"cross_attention_dim": 24}, "24 wide, but the text encoder's are 20"),
    ("unet/config.json", {"sample_size": -8}, "sample_size"),
    ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu'; minisd computes only 'silu'"),
    ("unet/config.json", {"norm_eps": 1e-6}, "norm_eps"),
    ("unet/config.json", {"only_cross_attention": [True, False, False]}, "only_cross_attention"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
    ("unet/config.json", {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers"),
    ("unet/config.json", {"num_attention_heads": 8}, "num_attention_heads"),
    ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type"),
    ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor"),
    ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
    ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv"),
    ("vae/config.json", {"act_fn": "relu"}, "act_fn"),
    ("vae/config.json", {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act"),
    ("text_encoder/config.json", {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ("text_encoder/config.json", {"num_hidden_layers": MANY}, "num_hidden_layers"),
    ("text_encoder/config.json", {"num_attention_heads": 3}, "num_attention_heads"),
    ("text_encoder/config.json", {"vocab_size": "many"}, "vocab_size"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
    ("scheduler/scheduler_config.json", {"prediction_type": {}}, "prediction_type"),
    ("scheduler/scheduler_config.json", {"beta_start": float("inf")}, "beta_start"),
    ("scheduler/scheduler_config.json", {"beta_start": 0.5}, "beta_start"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "fields", "message"), BAD_FIELDS, ids=lambda value: str(value)[:50]
)
def test_config_of_a_model_that_minisd_does_not_compute(file, fields, message, folder):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("file", sorted({file for file, _, _ in BAD_FIELDS}))
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing|no model_index"),
        (b"", "not readable JSON"),
        (b"[1]", "not an object"),
        (b'{"a": 1, "a": 2}', "has 'a' twice"),
        (b"[" * 10**5, "not readable JSON"),
        (b" " * 10**8, "too large for a configuration"),
    ],
    ids=["missing", "empty", "array", "field twice", "deep", "100 MB"],
)
def test_config_that_is_none(file, content, message, folder):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(WeightError, match=message):
        open_checkpoint(folder)


WHOLE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.safetensors"}, r"names '../x.safetensors', which is not a shard in its own"),
        ({"a": "x/y.safetensors"}, "which is not a shard in its own folder"),
        ({"a": "x\\y.safetensors"}, "which is not a shard in its own folder"),
        ({"a": "/etc/passwd"}, "which is not a shard in its own folder"),
        ({"a": "pickle.bin"}, "which is not a shard in its own folder"),
        ({"a": "x.safetensors"}, "names x.safetensors, which is missing"),
        ({"a": "one.safetensors"}, "do not hold the same tensors"),
        ({"a": 1}, "no weight_map"),
        (["a"], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_shard_index_that_lies(weight_map, message, folder):
    (folder / "unet" / WHOLE).rename(folder / "unet" / "one.safetensors")
    index = folder / "unet" / f"{WHOLE}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightError, match=message):
        open_checkpoint(folder)


def test_folder_of_pickles_says_how_to_convert(folder):
    (folder / "vae" / WHOLE).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightError, match="vae has no diffusion_pytorch_model.safetensors.*save_f"):
        open_checkpoint(folder)


def test_yaml_with_an_unknown_parameterization(sd1, tmp_path):
    (tmp_path / "a.yaml").write_text("parameterization: x0")
    os.symlink(sd1, tmp_path / "a.safetensors")
    with pytest.raises(WeightError, match="parameterization is 'x0'"):
        open_checkpoint(tmp_path / "a.safetensors")
