"""What a library must leave alone: the state that a whole process or thread shares.

    with unchanged():
        minisd.load(device="cpu")("a red heart")

fails with one sentence that names each thing that changed, before and after. ``READERS`` lists the
things; another one is another row. A reader changes nothing and imports no library, so that a first
import can be watched too: what a library holds is UNREAD until it has been imported.

Not seen from Python: what C code puts into the environment behind ``os.environ``, the threads of C
libraries (torch's pool stays after its first use), and how other threads treat denormals.
"""

import gc
import hashlib
import locale
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path

UNREAD = "unread"


@contextmanager
def unchanged(but: Collection[str] = ()) -> Iterator[None]:
    """Every row but these must stay as it is, whether the block raises or not."""
    gc.collect()  # a file that earlier code forgot must not be closed in the block
    before = snapshot()
    try:
        yield
    finally:
        changed = changes(before, snapshot(), but)
        assert not changed, f"the block changed {', and '.join(changed.values())}"


def snapshot() -> dict[str, object]:
    state: dict[str, object] = dict.fromkeys(READERS, UNREAD)
    for row, reader in READERS.items():
        # No such module yet; no such system file; not in this thread.
        with suppress(AttributeError, LookupError, OSError, ValueError):
            state[row] = reader()
    return state


def changes(before: dict, after: dict, but: Collection[str] = ()) -> dict[str, str]:
    """Row -> what became of it."""
    return {row: "{} from {} to {}".format(row, *differing(old, after[row]))
            for row, old in before.items()
            if row not in but and UNREAD not in (old, after[row]) and old != after[row]}


def differing(old: object, new: object) -> tuple[object, object]:
    """Both without what they have in common: some lists are long."""
    if isinstance(old, list) and isinstance(new, list):
        gone = [each for each in old if old.count(each) > new.count(each)]
        come = [each for each in new if new.count(each) > old.count(each)]
        return (gone, come) if gone or come else (old, new)
    return old, new


def value(path: str) -> object:
    """What an absolute name stands for, in a module of Python's or one that is imported already."""
    module, *names = path.split(".")
    found = import_module(module) if module in sys.stdlib_module_names else sys.modules[module]
    for name in names:
        found = getattr(found, name)
    return list(found) if isinstance(found, list) else found


def call(path: str, *args: object) -> object:
    return value(path)(*args)


def digest(*state: object) -> str:
    """Long states as a few letters."""
    return hashlib.sha256(repr(state).encode()).hexdigest()[:8]


def cuda_random() -> str:
    if not call("torch.cuda.is_initialized"):  # reading would start CUDA
        return UNREAD
    return digest([state.tolist() for state in call("torch.cuda.get_rng_state_all")])


def open_files() -> list[str]:
    """Where each descriptor leads. That of the listing itself is gone again."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(targets)


def wakeup_descriptor() -> int:
    descriptor = signal.set_wakeup_fd(-1)  # there is no other way to read it
    signal.set_wakeup_fd(descriptor)
    return descriptor


VALUES = """
    warnings.filters warnings.showwarning warnings.formatwarning threading.excepthook
    sys.path sys.excepthook sys.unraisablehook
    sys.stdin sys.stdin.encoding sys.stdin.errors sys.stdin.line_buffering
    sys.stdout sys.stdout.encoding sys.stdout.errors sys.stdout.line_buffering
    sys.stderr sys.stderr.encoding sys.stderr.errors sys.stderr.line_buffering
    logging.root.level logging.root.handlers logging.root.manager.disable
    PIL.Image.MAX_IMAGE_PIXELS PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    PIL.PngImagePlugin.MAX_TEXT_CHUNK PIL.PngImagePlugin.MAX_TEXT_MEMORY
    torch.backends.cudnn.enabled torch.backends.cudnn.benchmark torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic torch.backends.cuda.matmul.allow_tf32
    torch.backends.mkldnn.enabled"""
CALLS = """
    os.getcwd gc.isenabled gc.get_threshold sys.getrecursionlimit faulthandler.is_enabled
    socket.getdefaulttimeout threading.enumerate numpy.geterr
    torch.get_num_threads torch.get_num_interop_threads
    torch.get_default_dtype torch.get_default_device torch.get_float32_matmul_precision
    torch.is_grad_enabled torch.is_inference_mode_enabled torch.is_anomaly_enabled
    torch.is_autocast_cache_enabled torch.are_deterministic_algorithms_enabled
    torch.is_deterministic_algorithms_warn_only_enabled
    torch.backends.cuda.flash_sdp_enabled torch.backends.cuda.mem_efficient_sdp_enabled
    torch.backends.cuda.math_sdp_enabled torch.backends.cuda.cudnn_sdp_enabled"""
READERS: dict[str, Callable[[], object]] = {
    **{path: partial(value, path) for path in VALUES.split()},
    **{path: partial(call, path) for path in CALLS.split()},
    **{f"autocast on {device}": lambda device=device: (
        call("torch.is_autocast_enabled", device), call("torch.get_autocast_dtype", device))
       for device in ("cpu", "cuda")},
    "os.environ": lambda: sorted(os.environ.items()),
    "open files": open_files,
    # os.umask() would have to change it, for all threads.
    "umask": lambda: Path("/proc/self/status").read_text().split("Umask:")[1].split()[0],
    "signal handlers": lambda: [(s, signal.getsignal(s)) for s in sorted(signal.valid_signals())],
    "signal wakeup descriptor": wakeup_descriptor,
    "locale": lambda: locale.setlocale(locale.LC_ALL, None),
    "decimal context": lambda: str(call("decimal.getcontext")),
    # The first lock between processes settles it, and set_start_method() raises from then on.
    "multiprocessing start method": lambda: call("multiprocessing.get_start_method", True),
    "imports of transformers": lambda: sorted(sys.modules.keys() & {"transformers", "diffusers"}),
    "random numbers of Python": lambda: digest(call("random.getstate")),
    "random numbers of NumPy": lambda: digest(call("numpy.random.get_state")),
    "random numbers of torch": lambda: digest(call("torch.get_rng_state").tolist()),
    "random numbers of CUDA": cuda_random,
    # torch cannot say what torch.set_flush_denormal() set, but Python's floats obey it too.
    "flushing of denormals": lambda: sys.float_info.min / 2 == 0,
}
