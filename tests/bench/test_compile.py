"""The compiled kernels are within bounds, and the check of the bounds finds what is not.

An interpreted kernel cannot be compiled, so compiling runs in processes of its own, each with an
empty cache.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton compiles the kernels")

from bench import machine_code  # noqa: E402
from bench.compile import Variant  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not machine_code.CUOBJDUMP.exists(), reason="this triton comes without cuobjdump"
)
ATTENTION = Variant("attention_kernel", "float16", "D=40 BLOCK_D1=32 BLOCK_D2=16", 8, 3)
GOOD = machine_code.Figures(  # of that on sm_90
    registers=116, stack=0, spills=0, matrix=22, instructions=1096, unwritten="", shared=49152,
    programs=2)


def python(script: str, cache: Path, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_few_of_every_kind_are_within_bounds(tmp_path):
    """Of the variants that differ in the width of a head alone, the widest has most to keep."""
    done = python("""
import sys
from bench.compile import main
raise SystemExit(max(main(["--only", only]) for only in sys.argv[1:]))
""", tmp_path,
        "sm_90 attention_kernel float16 heads:i32 D=40",
        "sm_90 attention_kernel float16 heads:i32 D=160", "sm_90 attention_sliced_kernel float16",
        "sm_90 attention_sliced_kernel float32 heads:i32 seqlen_k:i32 D=160",
        "gfx942 layer_norm_kernel float16 C=320", "sm_80 geglu_kernel",
        "sm_100 layer_norm_kernel float16 C=1280")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 of" not in done.stdout  # each of them found something


def test_a_cache_is_filled_ahead(tmp_path):
    """It has the kernels that such a GPU launches: a second compilation finds them."""
    done = python("""
import torch
from bench import cases, compile
calls = compile.variants(lambda: compile.calls(compile.ours, cases.LAYER_NORMS[:2], torch.float16))
compile.variants = lambda all_of: calls
assert compile.main(["--ahead", "sm_90", "--workers", "1"]) == 0
import triton
code, options = compile.source(next(iter(calls.values())), compile.TARGETS["sm_90"].gpu)
triton.knobs.compilation.listener = lambda **said: print("hit", said["cache_hit"])
triton.compile(code, compile.TARGETS["sm_90"].gpu, options)
""", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 compiled" in done.stdout and "hit True" in done.stdout


def test_every_rung_of_the_ladder_compiles(tmp_path):
    """A head of 160, ragged keys: padded to 256 columns it spills, in two pieces it does not."""
    done = python("""
import torch
from functools import partial
from bench import cases, providers
from bench.compile import META, broken, compiled, variants

def rungs():
    norm = cases.GroupNorm("SD1.5", 2, 320, 64, True, 1)
    for case in (cases.Attention("SD1.5", 2, 8, 256, 77, 160, 1), norm):
        inputs = case.inputs(META, torch.float16)
        for rung in providers.LADDER[case.op].values():
            yield partial(case.call, rung, *inputs)

for v in variants(rungs):
    made = compiled(rungs, (v, "sm_90"))
    assert not isinstance(made, str), made
    print(v.kernel, *broken(made, "sm_90", v.products and "naive" not in v.kernel), sep=": ")
""", tmp_path)
    assert done.returncode == 0, done.stderr
    said = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    assert len(said) == 9
    for kernel, line in said.items():
        spills = kernel in ("attention_2_tiled_kernel", "attention_3_online_kernel")
        assert ("spills" in line) == spills and line.count(": ") == spills


def test_settings_that_break_a_bound_are_named_with_exit_code_1(tmp_path):
    done = python("""
import torch
from bench import cases, compile
from minisd_kernels.ops.launch import DEFAULT, Tile

def work():
    return compile.calls(compile.ours, cases.SELF_ATTENTION[:1], torch.float16)

compile.work = work
for target, tile in (("sm_90", Tile(128, 128, 4, 3)), ("sm_90", Tile(16, 64, 4, 2)),
                     ("sm_89", Tile(64, 128, 8, 5))):
    DEFAULT["attention", 32] = tile
    compile.variants.cache_clear()
    assert compile.main(["--only", f"{target} attention_kernel float16 heads:i32 D=40"]) == 1
""", tmp_path)
    assert done.returncode == 0, done.stderr
    reports = [text.partition("broken:")[2] for text in done.stdout.split("compiled with")[1:]]
    said = ("spills, with", "no HGMMA", "shared memory past 101376")  # wgmma takes 64 rows
    for report, words in zip(reports, said, strict=True):
        assert words in report and "D=40" in report


def broken(change: dict) -> list[str]:
    """The bounds broken on a target by a variant with other figures."""
    change, target = dict(change), change.get("target", "sm_90")
    v = ATTENTION._replace(**{k: change.pop(k) for k in ("kernel", "dtype") if k in change})
    change.pop("target", None)
    return machine_code.broken(GOOD._replace(**change), target, v.products)


@pytest.mark.parametrize("change", [
    {}, {"dtype": "float32", "matrix": 0}, {"kernel": "geglu_kernel", "matrix": 0},
    {"shared": 227 * 1024}, {"target": "gfx942", "shared": 65536},
], ids=str)
def test_kernels_within_bounds_are_not_reported(change):
    assert broken(change) == []


@pytest.mark.parametrize("change", [
    {"unwritten": "UR13 at 30c0"}, {"stack": 8}, {"spills": 1}, {"shared": 227 * 1024 + 1},
    {"matrix": 0}, {"kernel": "attention_sliced_kernel", "matrix": 0},
    {"target": "sm_80", "shared": 163 * 1024 + 1}, {"target": "gfx942", "shared": 65537},
    {"target": "gfx942", "spills": 1}, {"dtype": "bfloat16", "target": "sm_100", "matrix": 0},
], ids=str)
def test_each_bound(change):
    assert len(broken(change)) == 1


CODE = """
        /*0000*/                   ULDC.64 UR14, c[0x0][0x208] ;
        /*0010*/              @!P1 BRA 0x30 ;
        /*0020*/                   UMOV UR4, 0x400 ;
        /*0030*/               @P1 LDG.E.128 R16, desc[UR14][R20.64+0x40] ;
        /*0040*/                   UIADD3 UR6, UP0, {lo}, 0x20, URZ ;
        /*0050*/                   UIADD3.X UR7, URZ, -0x3ffffff0, URZ, UP0, !UPT ;
        /*0060*/                   HGMMA.64x16x16.F32 R40, R52, gdesc[UR4].tnspB, R40, gsb0 ;
        /*0070*/                   STS.128 [R12+{base}], R16 ;
        /*0080*/                   EXIT ;
        /*0090*/                   UMOV UR9, UR60 ;
"""


@pytest.mark.parametrize("lo, base, found", [
    ("UR14", "UR15", []),
    ("UR13", "UR15", ["UR13 at 0040"]),  # the bug of ptxas 12.8
    ("UR14", "UR4", ["UR4 at 0070"]),  # written, but not on the path that skips 0020
])
def test_registers_that_nothing_wrote(lo, base, found):
    """The HGMMA has A in registers, so it reads only UR6 and UR7 of UR4 to UR7; 0090 is
    unreachable."""
    code = machine_code.instructions(CODE.format(lo=lo, base=base))
    assert len(code) == 10 and machine_code.unwritten(code) == found


@pytest.mark.parametrize("target, registers, shared, warps, fit", [
    ("sm_90", 128, 65536, 8, 2),  # fits twice: 128 * 256 * 2 = 65536
    ("sm_90", 129, 65536, 8, 1),  # a warp's registers are allocated in units of 256, 8 a thread
    ("sm_90", 32, 0, 1, 32),  # never more than 32
    ("sm_90", 32, 75 * 1024, 4, 3),  # 3 * (75 + 1) = 228 KiB
    ("sm_89", 32, 0, 8, 6),  # 48 warps
])
def test_how_many_programs_fit(target, registers, shared, warps, fit):
    assert machine_code.programs(machine_code.TARGETS[target], registers, shared, warps) == fit
