"""Rows of results: their columns for the machine, the versions and the commit; and their files."""

import csv
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import minisd_kernels.proof
import torch
import triton

import minisd

ROOT = Path(__file__).parents[1]
MACHINE = ["device", "capability", "driver", "torch", "triton", "commit", "date"]
COLUMNS = ["kernel", "provider", "metric", "unit", "shape", "dtype", "p20", "p50", "p80", "max_err",
           *MACHINE, "note"]
EQUALITY = ["kernel", "shape", "dtype", "max_err", "torch_err", "bound", "ok", *MACHINE, "note"]


def refuse_two_trees() -> None:
    """Exit unless bench, minisd and minisd_kernels are of one tree: else the rows would name
    another commit than the one measured."""
    files = (__file__, minisd.__file__, minisd_kernels.proof.__file__)
    trees = {str(Path(file).resolve().parents[1]) for file in files}
    if len(trees) > 1:
        raise SystemExit(f"bench, minisd and minisd_kernels are not from one tree but from "
                         f"{', '.join(sorted(trees))}; install with: pip install -e .")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine(device: torch.device, interpreted: bool, commit: str = "",
            date: str = "") -> dict[str, str]:
    """The columns of MACHINE. A CPU has no compute capability and no driver. Rows of one ``date``
    are of one run, even if several processes wrote them."""
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver()
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    else:
        name, driver, capability = _processor(), "none", "none"
    return {
        "device": name + " (Triton's interpreter)" * interpreted,
        "capability": capability,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or _commit(),
        "date": date or now(),
    }


def _processor() -> str:
    """The name of the CPU, where Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _said(*command: str) -> str:
    """The first line that a command prints; "unknown" if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _driver() -> str:
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str:
    return _said("git", "describe", "--always", "--dirty", "--abbrev=10")


def append(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Append rows to a CSV file. Raises SystemExit if its columns are others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        old = next(csv.reader(file), None)
        if old not in (None, columns):
            raise SystemExit(f"{path} has other columns: {', '.join(old)}")
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if old is None:
            writer.writeheader()
        writer.writerows(rows)
