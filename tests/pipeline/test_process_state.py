"""A load and a call change nothing that the whole process shares, not even for a moment."""

import contextlib
import decimal
import gc
import io
import locale
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from process_state import READERS, UNREAD, changes, snapshot, unchanged

import minisd
from minisd import images, loading, pipeline
from minisd.app.cli import main
from minisd.checkpoints import checkpoint, save

CALL = {"num_inference_steps": 2, "height": 32, "width": 32, "seed": 0}
PROMPT = "a red heart on a blue background"
STREAMS = ("stdin", "stdout", "stderr")


# --- the helper can fail


def attribute(owner, name, other):
    def mutate(undo):
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, other)
    return mutate


def setting(get, put, other):
    def mutate(undo):
        undo.callback(put, get())
        put(other)
    return mutate


def toggle(owner, name):
    return lambda undo: attribute(owner, name, not getattr(owner, name))(undo)


def switch(get, put):
    return lambda undo: setting(get, put, not get())(undo)


def context(make):
    return lambda undo: undo.enter_context(make())


def stream(name, key, other):
    return lambda undo: setting(
        lambda: getattr(getattr(sys, name), key),
        lambda value: getattr(sys, name).reconfigure(**{key: value}), other)(undo)


def filters(undo):
    undo.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")


def thread(undo):
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    undo.callback(other.join)
    undo.callback(end.set)
    other.start()


def wakeup(undo):
    for end in socket.socketpair():
        undo.enter_context(end).setblocking(False)
    undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(end.fileno()))


def imported(undo):
    module = sys.modules.pop("diffusers", None)
    if module is None:
        sys.modules["diffusers"] = ModuleType("diffusers")
        undo.callback(sys.modules.pop, "diffusers")
    else:
        undo.callback(sys.modules.__setitem__, "diffusers", module)


def cuda_random(undo):
    undo.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state())
    torch.rand(1, device="cuda")


sdp, cudnn = torch.backends.cuda, torch.backends.cudnn
MUTATIONS = {
    "warnings.filters": filters,
    "warnings.showwarning": attribute(warnings, "showwarning", print),
    "warnings.formatwarning": attribute(warnings, "formatwarning", print),
    "threading.excepthook": attribute(threading, "excepthook", print),
    "sys.path": lambda undo: undo.callback(sys.path.remove, sys.path.append("x") or "x"),
    "sys.excepthook": attribute(sys, "excepthook", print),
    "sys.unraisablehook": attribute(sys, "unraisablehook", print),
    **{f"sys.{name}": attribute(sys, name, io.StringIO()) for name in STREAMS},
    **{f"sys.{name}.encoding": stream(name, "encoding", "latin-1") for name in STREAMS},
    **{f"sys.{name}.errors": stream(name, "errors", "replace") for name in STREAMS},
    **{f"sys.{name}.line_buffering": stream(name, "line_buffering", True) for name in STREAMS},
    "logging.root.level": setting(lambda: logging.root.level, logging.root.setLevel, 7),
    "logging.root.handlers": attribute(logging.root, "handlers", [logging.NullHandler()]),
    "logging.root.manager.disable": attribute(logging.root.manager, "disable", 7),
    "PIL.Image.MAX_IMAGE_PIXELS": attribute(Image, "MAX_IMAGE_PIXELS", 7),
    "PIL.ImageFile.LOAD_TRUNCATED_IMAGES": toggle(ImageFile, "LOAD_TRUNCATED_IMAGES"),
    "PIL.PngImagePlugin.MAX_TEXT_CHUNK": attribute(PngImagePlugin, "MAX_TEXT_CHUNK", 7),
    "PIL.PngImagePlugin.MAX_TEXT_MEMORY": attribute(PngImagePlugin, "MAX_TEXT_MEMORY", 7),
    **{f"torch.backends.cudnn.{name}": toggle(cudnn, name)
       for name in ("enabled", "benchmark", "allow_tf32", "deterministic")},
    "torch.backends.cuda.matmul.allow_tf32": toggle(torch.backends.cuda.matmul, "allow_tf32"),
    "torch.backends.mkldnn.enabled": toggle(torch.backends.mkldnn, "enabled"),
    "os.getcwd": context(lambda: contextlib.chdir("/")),
    "gc.isenabled": switch(gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "gc.get_threshold": setting(gc.get_threshold, lambda all: gc.set_threshold(*all), (7000, 7, 7)),
    "sys.getrecursionlimit": setting(sys.getrecursionlimit, sys.setrecursionlimit, 2345),
    "socket.getdefaulttimeout": setting(socket.getdefaulttimeout, socket.setdefaulttimeout, 7.0),
    "threading.enumerate": thread,
    "numpy.geterr": context(lambda: np.errstate(all="raise")),
    "torch.get_num_threads": setting(torch.get_num_threads, torch.set_num_threads, 2),
    "torch.get_default_dtype": setting(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "torch.get_default_device": setting(lambda: None, torch.set_default_device, "meta"),
    "torch.get_float32_matmul_precision": setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "torch.is_grad_enabled": switch(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.is_inference_mode_enabled": context(torch.inference_mode),
    "torch.is_anomaly_enabled": switch(
        torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch.is_autocast_cache_enabled": switch(
        torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    # torch.use_deterministic_algorithms() would also import torch's compiler, which changes more.
    "torch.are_deterministic_algorithms_enabled": switch(
        torch.are_deterministic_algorithms_enabled, torch._C._set_deterministic_algorithms),
    "torch.is_deterministic_algorithms_warn_only_enabled": switch(
        torch.is_deterministic_algorithms_warn_only_enabled,
        lambda on: torch._C._set_deterministic_algorithms(on, warn_only=on)),
    **{f"torch.backends.cuda.{name}_sdp_enabled": switch(
        getattr(sdp, f"{name}_sdp_enabled"), getattr(sdp, f"enable_{name}_sdp"))
       for name in ("flash", "mem_efficient", "math", "cudnn")},
    "autocast on cpu": context(lambda: torch.autocast("cpu")),
    "autocast on cuda": setting(lambda: torch.get_autocast_dtype("cuda"),
                                lambda dtype: torch.set_autocast_dtype("cuda", dtype),
                                torch.bfloat16),
    "os.environ": lambda undo: undo.callback(
        os.environ.pop, os.environ.setdefault("MINISD_TEST", "MINISD_TEST")),
    "open files": context(lambda: open(os.devnull)),
    "umask": lambda undo: undo.callback(os.umask, os.umask(0o007)),
    "signal handlers": setting(lambda: signal.getsignal(signal.SIGINT),
                               lambda handler: signal.signal(signal.SIGINT, handler),
                               signal.SIG_DFL),  # in a shell's background it is ignored
    "signal wakeup descriptor": wakeup,
    "locale": lambda undo: setting(
        lambda: locale.setlocale(locale.LC_CTYPE), lambda to: locale.setlocale(locale.LC_CTYPE, to),
        "C.UTF-8" if locale.setlocale(locale.LC_CTYPE) == "C" else "C")(undo),
    "decimal context": lambda undo: attribute(decimal.getcontext(), "prec", 7)(undo),
    "multiprocessing start method": setting(
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda method: multiprocessing.set_start_method(method, force=True), "spawn"),
    "imports of transformers": imported,
    "random numbers of Python": setting(random.getstate, random.setstate,
                                        random.Random(7).getstate()),
    "random numbers of NumPy": setting(np.random.get_state, np.random.set_state,
                                       np.random.RandomState(7).get_state()),
    "random numbers of torch": setting(torch.get_rng_state, torch.set_rng_state,
                                       torch.Generator().manual_seed(7).get_state()),
    "random numbers of CUDA": cuda_random,
    "flushing of denormals": setting(lambda: False, torch.set_flush_denormal, True),
}
# What cannot be restored, or not as pytest had set it: in a process of their own.
FINAL_MUTATIONS = {
    "torch.get_num_interop_threads": "torch.set_num_interop_threads(7)",
    "faulthandler.is_enabled": "(faulthandler.disable if on else faulthandler.enable)()",
}


def test_every_row_has_its_mutation():
    assert READERS.keys() == MUTATIONS.keys() | FINAL_MUTATIONS.keys()


@pytest.mark.parametrize("row", MUTATIONS)
def test_a_change_of_any_row_fails(row, monkeypatch):
    for name in STREAMS:  # pytest's own lack some attributes
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    if row == "random numbers of CUDA" and torch.cuda.is_available():
        torch.cuda.init()
    before = snapshot()
    if before[row] == UNREAD:
        assert row == "random numbers of CUDA" or sys.platform != "linux"
        pytest.skip("it cannot be read here")
    with ExitStack() as undo:
        with pytest.raises(AssertionError) as caught, unchanged():
            MUTATIONS[row](undo)
        expected = changes(before, snapshot())[row]
    assert expected.startswith(f"{row} from ") and expected in str(caught.value)
    assert not changes(before, snapshot()), "the mutation was not undone"


def test_a_change_for_good_of_any_row_fails():
    run = fresh(f"""
        import faulthandler, torch
        on = faulthandler.is_enabled()
        with unchanged():
            {"; ".join(FINAL_MUTATIONS.values())}
    """)
    for row in FINAL_MUTATIONS:
        assert f"{row} from " in run.stderr.split("AssertionError: the block changed ")[1]


def test_the_sentence_names_every_change_and_shows_only_what_differs(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    with pytest.raises(AssertionError) as caught, unchanged():
        monkeypatch.setenv("MINISD_TEST", "1")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    assert str(caught.value) == (
        "the block changed PIL.Image.MAX_IMAGE_PIXELS from 3 to 7, and os.environ from [] to "
        "[('MINISD_TEST', '1')]")


def test_a_block_that_raises_is_looked_at_too(monkeypatch):
    with pytest.raises(KeyError), unchanged():
        raise KeyError
    with pytest.raises(AssertionError, match="MAX_IMAGE_PIXELS"), unchanged():
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
        raise KeyError
    with unchanged(but=["PIL.Image.MAX_IMAGE_PIXELS"]):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)


def fresh(script):
    """Run it, indented as it is, in a new process that has imported nothing but the helper."""
    script = "from process_state import unchanged\n" + textwrap.dedent(script)
    # One thread as in conftest.py: the others would wait for each other.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, timeout=120,
                          capture_output=True, text=True)


# --- loading and calling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, good and bad, and a damaged file of weights."""
    folder = tmp_path_factory.mktemp("files")
    photo = Image.radial_gradient("L").resize((40, 24))
    photo.save(folder / "mask.png")
    photo.convert("RGB").save(folder / "photo.png")
    photo.convert("RGB").save(folder / "photo.jpg")
    photo.convert("P").save(folder / "palette.png", transparency=bytes(range(256)))
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"  # Pillow warns that it is corrupt
    photo.convert("RGB").save(folder / "warned.jpg", exif=exif)
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:-200])
    (folder / "damaged.safetensors").write_bytes(b"\xff\0\0\0\0\0\0\0{" + bytes(300))
    return folder


@pytest.fixture(scope="module")
def sd():
    return minisd.load(device="cpu")


def loaded(**options):
    return lambda sd, folder: minisd.load(device="cpu", **options)(PROMPT, **CALL)


def called(error=None, **options):
    def run(sd, folder):
        files = {name: folder / options[name] for name in ("image", "mask_image")
                 if name in options}
        with pytest.raises(error) if error else contextlib.nullcontext():
            sd(PROMPT, **CALL | options | files)
    return run


def stopped(*args):
    raise KeyboardInterrupt


def rejected_load(sd, folder):
    with pytest.raises(minisd.WeightError):
        minisd.load(folder / "damaged.safetensors", device="cpu")
    with pytest.raises(FileNotFoundError):
        minisd.load(folder / "none.safetensors", device="cpu")


def saved(sd, folder):
    sd.save(folder / "copy")
    sd.save(folder / "copy.safetensors")
    with pytest.raises(FileExistsError):
        sd.save(folder / "copy")
    minisd.load(folder / "copy", device="cpu")
    minisd.load(folder / "copy.safetensors", config=folder / "copy", device="cpu")


def moved(sd, folder):
    other = minisd.load(device="cpu").to(dtype="float64")
    other.release()
    other(PROMPT, **CALL)


def line(code, *options):
    def run(sd, folder):
        placed = [str(folder / each) if "." in each else each for each in options]
        common = ["--size", "32x32", "--steps", "2", "--device", "cpu"]
        assert main([PROMPT, *common, *placed]) == code
    return run


DEEDS = {
    "load and call": loaded(),
    "ops torch": loaded(ops="torch"),
    "ops reference": loaded(ops="reference"),
    "fused": loaded(fused=True),
    "bfloat16": loaded(dtype="bfloat16"),
    "a bar": called(progress=True),
    "no seed": called(seed=None, eta=1.0),
    "latents": called(output_type="latent"),
    "png": called(image="photo.png"),
    "palette": called(image="palette.png"),
    "jpeg": called(image="photo.jpg"),
    "inpainting": called(image="photo.png", mask_image="mask.png"),
    "image cut short": called(minisd.ImageError, image="cut.png"),
    "no image": called(FileNotFoundError, image="none.png"),
    "rejected": called(ValueError, num_inference_steps=0),
    "rejected type": called(TypeError, negative_prompt=7),
    "interrupted": called(KeyboardInterrupt, callback_on_step_end=stopped, progress=True),
    "rejected load": rejected_load,
    "save": saved,
    "to": moved,
    "line": line(0, "--output", "line.png"),
    "line with an image": line(0, "--output", "other.png", "--image", "photo.png", "--mask",
                               "mask.png"),
    "line, rejected option": line(2, "--strength", "2"),
    "line, rejected image": line(2, "--output", "no.png", "--image", "cut.png"),
    "line, rejected model": line(3, "--output", "no.png", "--model", "damaged.safetensors"),
    "info": lambda sd, folder: main(["info", str(folder / "photo.png")]),
    "words": lambda sd, folder: main(["words"]),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_nothing_is_changed(deed, sd, folder):
    with unchanged():
        DEEDS[deed](sd, folder)


def test_a_warning_of_pillow_is_left_to_the_caller(sd, folder):
    with pytest.warns(UserWarning, match="EXIF"), unchanged():
        sd(PROMPT, image=folder / "warned.jpg", **CALL)


# numpy and torch add filters of their own when they are imported.
@pytest.mark.parametrize("first, but", [("", ["warnings.filters"]), ("import numpy, torch", [])],
                         ids=["nothing imported", "torch imported"])
def test_the_first_use_in_a_process_changes_nothing(first, but, folder, tmp_path):
    run = fresh(f"""
        {first}
        with unchanged(but={but}):
            import minisd
            from minisd.app.cli import main
            call = dict(prompt={PROMPT!r}, num_inference_steps=2, height=32, width=32)
            sd = minisd.load(device="cpu")
            sd(**call)
            sd(**call, image={str(folder / "palette.png")!r}, progress=True)
            sd.save({str(tmp_path / "copy")!r})
            minisd.load(device="cpu", fused=True)(**call)
            assert main([{PROMPT!r}, "--steps=1", "--device=cpu", "--output",
                         {str(tmp_path / "x.png")!r}]) == 0
    """)
    assert run.returncode == 0, run.stderr


# --- in the middle


def seen(monkeypatch, *functions):
    """A table that is filled with what another thread sees changed while each of them runs."""
    def look():
        # The looking thread is new, and the file that is being read is open.
        return changes(before, ask(), but=["threading.enumerate", "open files"])

    def ask():
        with ThreadPoolExecutor(1) as other:
            return other.submit(snapshot).result()

    def looking(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **options):
            if (owner, name) not in table:
                table[owner, name] = look()
            return function(*args, **options)

        monkeypatch.setattr(owner, name, wrapped)

    before, table = ask(), {}
    for owner, name in functions:
        looking(owner, name)
    return table


def test_another_thread_sees_no_change_in_the_middle(monkeypatch, folder, tmp_path):
    places = [
        (loading, "UNet"), (checkpoint, "read_tensor"), (images, "_turn"),
        (images, "_to_rgb"), (pipeline.UNet, "forward"), (pipeline.VAE, "encode"),
        (pipeline.VAE, "decode"), (images, "to_pil"), (save, "save_file"),
    ]
    table = seen(monkeypatch, *places)
    sd = minisd.load(device="cpu")
    sd(PROMPT, image=folder / "palette.png", progress=True, **CALL)
    sd.save(tmp_path / "copy")
    assert table == dict.fromkeys(places, {})


def test_the_command_line_shows_warnings_its_own_way_and_changes_nothing_else(
        monkeypatch, sd, folder):
    table = seen(monkeypatch, (images, "to_pil"))
    line(0, "--output", "seen.png")(sd, folder)
    changed = {"warnings.showwarning", "warnings.filters"}
    assert [change.keys() for change in table.values()] == [changed]


def test_no_call_enters_the_warnings_of_the_process(monkeypatch, folder):
    # Not even for a moment: a thread that leaves it brings back filters that are another's by now.
    with monkeypatch.context() as patch:  # undone before pytest itself enters it
        patch.setattr(warnings, "catch_warnings", lambda *_, **__: pytest.fail("entered"))
        sd = minisd.load(device="cpu", fused=True)
        sd(PROMPT, image=folder / "palette.png", mask_image=folder / "mask.png", **CALL)
        called(minisd.ImageError, image="cut.png")(sd, folder)


def test_threads_that_decode_at_once_leave_the_filters_alone(monkeypatch, folder):
    entered = {"a": threading.Event(), "b": threading.Event()}
    a_has_left, to_rgb = threading.Event(), images._to_rgb

    def overlapping(*args, **options):
        me = threading.current_thread().name
        entered[me].set()
        assert (entered["b"] if me == "a" else a_has_left).wait(10)
        return to_rgb(*args, **options)

    monkeypatch.setattr(images, "_to_rgb", overlapping)
    a, b = (threading.Thread(target=images.open_image, args=[folder / "photo.png"], name=name)
            for name in "ab")
    with unchanged():
        a.start()
        assert entered["a"].wait(10)
        b.start()
        a.join()
        a_has_left.set()
        b.join()
