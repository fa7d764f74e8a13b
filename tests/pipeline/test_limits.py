"""What memory there is: the machine's, the container's, the process's; the least of them counts."""

import subprocess
import sys

import pytest
import torch

from minisd import memory

CPU = torch.device("cpu")
GIB = 2**30
MACHINE = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    8388608 kB\nSwapFree:       0 kB\n"}
V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/a/b\n0::/\n"}


def v2(group: str, most: str, used: int, stat: str = "") -> dict[str, str]:
    place = f"cgroup/{group}"
    return {f"{place}memory.max": most, f"{place}memory.current": str(used),
            f"{place}memory.stat": stat}


def v1(group: str, most: int, used: int, stat: str = "") -> dict[str, str]:
    place = f"cgroup/memory/{group}"
    return {f"{place}memory.limit_in_bytes": f"{most}\n", f"{place}memory.usage_in_bytes":
            f"{used}\n", f"{place}memory.stat": stat}


FILES = "anon 5\ninactive_file 1073741824\nactive_file 7\n"
CASES = {  # the files of the system; the bytes that are free
    "a machine": (MACHINE, 8 * GIB),
    "no limit": (MACHINE | V2 | v2("a/b/", "max", GIB), 8 * GIB),
    "a limit": (MACHINE | V2 | v2("a/b/", f"{3 * GIB}\n", GIB), 2 * GIB),
    "files count as free": (MACHINE | V2 | v2("a/b/", f"{3 * GIB}", GIB + GIB, FILES), 2 * GIB),
    "a limit of an outer group": (
        MACHINE | V2 | v2("a/b/", "max", GIB) | v2("a/", f"{2 * GIB}", GIB), GIB),
    "the least of two": (
        MACHINE | V2 | v2("a/b/", f"{4 * GIB}", GIB) | v2("a/", f"{9 * GIB}", 8 * GIB), GIB),
    "in a container, whose own group is the root": (MACHINE | V2 | v2("", f"{GIB}", 0), GIB),
    "a group at the root": (MACHINE | {"proc/self/cgroup": "0::/\n"} | v2("", f"{GIB}", 0), GIB),
    "more in use than allowed": (MACHINE | V2 | v2("a/b/", f"{GIB}", 2 * GIB), 0),
    "version 1": (MACHINE | V1 | v1("a/b/", 3 * GIB, GIB), 2 * GIB),
    "version 1 in Docker": (MACHINE | V1 | v1("", 2 * GIB, GIB), GIB),
    "version 1 without a limit": (MACHINE | V1 | v1("a/b/", 2**63 - 4096, GIB), 8 * GIB),
    "version 1, files": (
        MACHINE | V1 | v1("a/b/", 3 * GIB, 2 * GIB, "inactive_file 5\ntotal_inactive_file "
                          f"{GIB}\n"), 2 * GIB),
    "a limit above the machine's memory": (MACHINE | V2 | v2("a/b/", f"{99 * GIB}", 0), 8 * GIB),
    "nothing is said": ({}, None),
    "nonsense": ({"proc/meminfo": "\xff", "proc/self/cgroup": "a:b\n0::\n"}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_least_of_all_limits_is_free(case, tmp_path, monkeypatch):
    texts, want = CASES[case]
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    assert memory.free(CPU) == want


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_limit_of_the_address_space():
    """As `ulimit -v` sets it."""
    script = """
import resource
import torch
from minisd import memory
torch.ones(1)
before, want = memory._of_process(), 2**30
size = memory._numbers(memory.PROC / "self/status", r"^(VmSize):\\s+(\\d+) kB$")["VmSize"] * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + want, size + want))
print(before, abs(memory.free(torch.device("cpu")) - want) < 2**27)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True)
    assert done.stdout == "None True\n"


def test_here_something_is_free():
    assert 0 < memory.free(CPU) < 1024 * 2**40
    assert memory.free(torch.device("mps")) is None
