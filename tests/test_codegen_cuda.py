"""What nvcc made of the kernels, without a GPU: no operation but the contract's, no spills, wide accesses, all inside.

The PTX is compiled here from csrc/cuda with the flags of the build, for a GPU with clusters and programmatic dependent
launch and for one without. The machine code is read where there is a cuobjdump (PyPI: nvidia-cuda-cuobjdump with
nvidia-cuda-nvdisasm).

    python -m pytest -s tests/test_codegen_cuda.py -k registers      prints every kernel's registers
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import build_c
import ptx
import pytest

import fusednorm
from fusednorm import _core

sys.path.insert(0, str(build_c.ROOT / "tools"))
import build_cuda

SOURCES = sorted((build_c.ROOT / "csrc" / "cuda").glob("*.cu"))
GPUS = ["80", "90"]
WIDTHS = "8|16|32|48|64|72|80|96|128|160|192|224"  # of warpgroup products
# What multiplies and adds at once in the kernels of products, by their sources. The norms have nothing of the kind.
PRODUCTS = {
    "mm_fma": r"fma\.rn\.f32",
    "mm_fma_few": r"fma\.rn\.f32",
    "mm_fma_many_sm90a": r"fma\.rn\.f32",
    "mm_bf16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    "mm_f16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
    "mm_hopper_bf16_sm90a": rf"wgmma\.mma_async\.sync\.aligned\.m64n(?:{WIDTHS})k16\.f32\.bf16\.bf16",
    "mm_hopper_f16_sm90a": rf"wgmma\.mma_async\.sync\.aligned\.m64n(?:{WIDTHS})k16\.f32\.f16\.f16",
}
MAX_MODULE_BYTES = 8 << 20


@cache
def toolkit() -> build_cuda.Toolkit:
    found = [build_cuda.read_toolkit(nvcc) for _, nvcc in build_cuda.nvcc_candidates() if nvcc]
    usable = [one for one in found if isinstance(one, build_cuda.Toolkit)]
    if not usable:
        pytest.skip("no nvcc here")
    return usable[0]


def compile_ptx(source: Path, gpu: str, flags: list[str] | None = None) -> Path:
    include = f"-I{build_c.ROOT / 'csrc'}"
    flags = [flag for flag in build_cuda.FLAGS if not flag.startswith("-I")] if flags is None else flags
    command = [toolkit().nvcc, *flags, include, f"-arch=compute_{gpu}", "-ptx", str(source)]
    return build_c.cached(f"{source.stem}-{gpu}.ptx", command, [source])


def assemble(text: Path, gpu: str) -> Path:
    """The machine code; in its log, the resources that each kernel takes."""
    command = [toolkit().nvcc, "-Xptxas=-v", f"-arch=sm_{gpu}", "-cubin", str(text)]
    return build_c.cached(f"{text.stem}.cubin", command, [text])


def kernels_of(source: Path, gpu: str) -> dict[str, ptx.Kernel]:
    found = ptx.kernels(compile_ptx(source, gpu).read_text())
    assert found, f"no kernel in the PTX of {source.name}"
    return found


def demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout
    return text.splitlines()


def tool(name: str) -> str:
    """From the toolkit, or from PyPI, whose packages put it beside their nvcc."""
    folders = [Path(toolkit().nvcc).parent, *(Path(folder, "nvidia/cu13/bin") for folder in sys.path)]
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if path is None:
        pytest.skip(f"{name} is not installed (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)")
    return path


# ---- the kernels ---------------------------------------------------------------------------------------------------


def gpus_of(source: Path) -> list[str]:
    return ["90a"] if source.name.endswith(build_cuda.ONLY_90A) else GPUS


CASES = [(source, gpu) for source in SOURCES for gpu in gpus_of(source)]
each_source = pytest.mark.parametrize("source, gpu", CASES, ids=[f"{source.stem}-{gpu}" for source, gpu in CASES])
each_gpu = pytest.mark.parametrize("gpu", GPUS)


@each_source
def test_every_operation_is_one_of_the_contract(source: Path, gpu: str) -> None:
    products = PRODUCTS.get(source.stem, "")
    kernels = kernels_of(source, gpu)
    wrong = {name: ptx.violations(kernel, products) for name, kernel in kernels.items()}
    assert {name: found for name, found in wrong.items() if found} == {}
    assert not products or any(kernel.count(products) for kernel in kernels.values())


@each_source
def test_nothing_is_hidden_from_the_checker(source: Path, gpu: str) -> None:
    """A word count over the whole text, which knows nothing of kernels: all of it is in the kernels that were read."""
    text = compile_ptx(source, gpu).read_text()
    read = kernels_of(source, gpu).values()
    for opcode in (r"fma\.rn\.f32", r"rsqrt\.approx\.ftz\.f32", r"div\.rn\.f32", r"mul\.rn\.f32", r"add\.rn\.f32"):
        assert sum(kernel.count(opcode) for kernel in read) == len(re.findall(rf"\b{opcode}\b", text)), opcode
    norms = [kernel for kernel in read if kernel.count(r"div\.rn\.f32")]
    assert all(ptx.expansions(kernel) for kernel in norms), "a norm without 1/sqrt"


RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\w+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@each_source
def test_registers_and_no_spills(source: Path, gpu: str) -> None:
    """Nothing of a kernel lives in local memory, neither spilled nor indexed. Prints the table of registers."""
    log = assemble(compile_ptx(source, gpu), gpu)
    rows = [match.groupdict() for match in RESOURCES.finditer(log.with_name(f"{log.name}.log").read_text())]
    entries = re.findall(r"\.entry\s+([\w$]+)", compile_ptx(source, gpu).read_text())
    assert sorted(row["name"] for row in rows) == sorted(entries)
    print(f"\n{source.name}, sm_{gpu}: {len(rows)} kernels")
    for row, name in zip(rows, demangled([row["name"] for row in rows])):
        shared = re.search(r"(\d+) bytes smem", row["rest"])
        print(f"  {row['registers']:>3} registers, {shared[1] if shared else 0:>5} bytes shared  {name}")
    local = [row for row in rows if (row["stack"], row["stores"], row["loads"]) != ("0", "0", "0")]
    assert local == []


# What ptxas says where it makes a program wait for warpgroup products that the program meant to overlap.
WAITS = re.compile(r"\(C75\d\d\)[^\n]*")
SUMS_READ_TOO_EARLY = """
#include "cuda/hopper.cuh"
extern "C" __global__ void planted(float *p, uint64_t a, uint64_t b, int n) {
    float sums[4] = {};
    for (int i = 0; i < n; i++) {
        fn_products_begin();
        fn_product<FN_BFLOAT16, 8>(sums, a, b, 1);
        fn_products_commit();
        fn_products_wait<1>();
        p[i] = sums[0];
    }
}
"""


def waits(source: Path, gpu: str) -> list[str]:
    log = assemble(compile_ptx(source, gpu), gpu)
    return WAITS.findall(log.with_name(f"{log.name}.log").read_text())


@each_source
def test_products_overlap(source: Path, gpu: str) -> None:
    assert waits(source, gpu) == []


def test_products_that_cannot_overlap_are_seen() -> None:
    source = build_c.cache_folder() / "probes" / "waits.cu"
    source.parent.mkdir(exist_ok=True)
    source.write_text(SUMS_READ_TOO_EARLY)
    assert waits(source, "90a")


@each_source
def test_aligned_rows_are_moved_by_16_bytes(source: Path, gpu: str) -> None:
    """Every kernel but the strided one reads and writes rows by vectors of 128 bits."""
    for name, kernel in kernels_of(source, gpu).items():
        if "strided" in name or not kernel.count(r"div\.rn\.f32"):
            continue
        for access in ("ld", "st"):
            pattern = rf"{access}\.(?:\w+\.)*?global\S*\.(?:v4\.[bfus]32|v2\.[bfus]64)"
            assert kernel.count(pattern), f"{name}: no {access}.global of 128 bits"


@each_gpu
def test_few_tokens_move_16_bytes(gpu: str) -> None:
    """Operands reach shared memory, and leave it, by 16 bytes alone; each of those read is in 4 sums at once."""
    for name, kernel in kernels_of(build_c.ROOT / "csrc" / "cuda" / "mm_fma_few.cu", gpu).items():
        assert kernel.count(r"cp\.async\.cg\.shared\.global"), name
        assert kernel.count(r"cp\.async\.c[ag]\.shared\.global") == kernel.count(r"cp\.async\.cg\.shared\.global"), name
        wide = kernel.count(r"ld\.shared\.v4\.[bfu]32")
        assert wide >= 2 * 16, f"{name}: {wide} reads of 16 bytes"
        fused = kernel.count(r"fma\.rn\.f32")
        assert fused % (17 * 4) == 0, f"{name}: {fused}: of a stage's 16 steps and of a single one, 4 lanes each"


def test_many_rows_are_brought_by_the_copy_engine() -> None:
    """No thread that multiplies reads memory but the bias; two reads of shared memory serve 16 multiply-adds."""
    for name, kernel in kernels_of(build_c.ROOT / "csrc" / "cuda" / "mm_fma_many_sm90a.cu", "90a").items():
        assert not kernel.count(r"cp\.async\.c[ag]"), name
        assert kernel.count(r"cp\.async\.bulk\.tensor\.2d\.shared\S*") in (3, 4), name
        wide, words = kernel.count(r"ld\.shared\.v2\.f32"), kernel.count(r"ld\.shared\.b32")
        assert kernel.count(r"fma\.rn\.f32") == 8 * (wide + words), name
        assert wide >= 7 * 8, f"{name}: {wide} reads of two lanes in the 4 steps of a stage and the 3 of a last one"


def machine_code(binary: Path, *options: str) -> dict[str, str]:
    tool("nvdisasm")
    command = [tool("cuobjdump"), "-sass", *options, str(binary)]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{Path(tool('nvdisasm')).parent}"}
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    functions = re.split(r"\bFunction : (\S+)", text)[1:]
    assert functions, f"{' '.join(command)} shows no function"
    return dict(zip(functions[::2], functions[1::2]))


def fused(code: str) -> int:
    """Fused operations, and flushing ones, of which the division's way for extreme operands has a few too."""
    return len(re.findall(r"\b(?:FFMA|FFMA2|HFMA2\.MMA|DFMA)\b(?!.* -?RZ, -?RZ,)|\bF(?:ADD|MUL)\S*\.FTZ\b", code))


@cache
def fused_in_one(gpu: str) -> tuple[int, int]:
    """In a single 1/sqrt and in a single division, as ptxas makes them."""
    folder = build_c.cache_folder() / "probes"
    folder.mkdir(exist_ok=True)
    counts = []
    for name, body in (("root", RIGHT["root"]), ("division", RIGHT["division"])):
        source = folder / f"{name}.cu"
        source.write_text(PRELUDE % body)
        text = compile_ptx(source, gpu)
        counts.append(fused(machine_code(assemble(text, gpu))["planted"]))
    return counts[0], counts[1]


@each_source
def test_ptxas_adds_no_fused_operation(source: Path, gpu: str) -> None:
    """Beyond those of __frsqrt_rn and of div.rn: the PTX allows none, so this is a second look at the first answer."""
    root, division = fused_in_one(gpu)
    assert root >= 5
    assert division >= 5
    code = machine_code(assemble(compile_ptx(source, gpu), gpu))
    if source.stem in ("mm_fma", "mm_fma_few", "mm_fma_many_sm90a"):  # they consist of them
        return
    if source.name.endswith(build_cuda.ONLY_90A):
        assert all(re.search(r"\bHGMMA\b", text) for text in code.values())
    for name, kernel in kernels_of(source, gpu).items():
        if name in code:
            allowed = root * len(ptx.expansions(kernel)) + division * kernel.count(r"div\.rn\.f32")
            assert fused(code[name]) <= allowed, name


# ---- the checker sees what it looks for ----------------------------------------------------------------------------

PRELUDE = """
#include "numerics.h"
#include <cuda_bf16.h>
extern "C" __global__ void planted(float *p, float a, float b, float c, __nv_bfloat162 *h) { %s }
"""
RIGHT = {
    "root": "p[0] = fn_rsqrt(a);",
    "division": "p[0] = fn_div(a, b);",
    "one of each": "p[0] = fn_div(fn_mul(fn_add(a, b), fn_rsqrt(c)), b);",
    "two roots": "p[0] = fn_add(fn_rsqrt(a), fn_rsqrt(b));",
    "a root in a loop": "for (int i = 0; i < (int)c; i++) p[i] = fn_rsqrt(p[i + 1]);",
    "a root after a product": "p[0] = fn_rsqrt(fn_add(fn_div(fn_mul(a, a), 8.0f), b));",
    "operators": "p[0] = a * b + c; p[1] = a / b - c;",
    "conversions": "h[0] = __floats2bfloat162_rn(a, b); p[0] = __low2float(h[1]); p[1] = (float)(int)a;",
}
WRONG = {
    "fma": ("p[0] = __fmaf_rn(a, b, c);", []),
    "fma beside a root": ("p[0] = __fmaf_rn(fn_rsqrt(a), b, c);", []),
    "fma of a root's own numbers": ("float r = fn_rsqrt(a); p[0] = __fmaf_rn(r, r, -fn_mul(r, r));", []),
    "contraction": ("p[0] = a * b + c;", ["-fmad=true"]),
    "contraction in double": ("p[0] = (float)((double)a * b + c);", ["-fmad=true"]),
    "rsqrtf": ("p[0] = rsqrtf(a);", []),
    "rsqrtf beside a root": ("p[0] = fn_add(fn_rsqrt(a), rsqrtf(b));", []),
    "rsqrt.approx.ftz": (
        'float r; asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a)); p[0] = fn_rsqrt(b) + r;',
        [],
    ),
    "__fdividef": ("p[0] = __fdividef(a, b);", []),
    "division by another route": ("p[0] = a / b;", ["-prec-div=false"]),
    "flush to zero": ("p[0] = fn_add(a, b);", ["-ftz=true"]),
    "flush to zero in a root": ("p[0] = fn_rsqrt(a);", ["-ftz=true"]),
    "fast math": ("p[0] = fn_div(a, b);", ["--use_fast_math"]),
    "another rounding": ("p[0] = __fadd_rz(a, b);", []),
    "truncating conversion": ("h[0] = __nv_bfloat162(__float2bfloat16_rz(a), __float2bfloat16_rz(b));", []),
    "16-bit arithmetic": ("h[0] = __hmul2(h[0], h[1]);", []),
    "an order that varies": ("atomicAdd(p, a);", []),
    "expf": ("p[0] = expf(a);", []),
}


def planted(body: str, flags: list[str], folder: Path, gpu: str) -> ptx.Kernel:
    source = folder / "planted.cu"
    source.write_text(PRELUDE % body)
    names = {flag.lstrip("-").split("=")[0] for flag in flags}
    fast = "use_fast_math" in names
    kept = [f for f in build_cuda.BIT_FLAGS if f.lstrip("-").split("=")[0] not in names and not fast]
    found = ptx.kernels(compile_ptx(source, gpu, ["-O3", "-std=c++17", *kept, *flags]).read_text())
    return found["planted"]


@each_gpu
@pytest.mark.parametrize("what", RIGHT)
def test_the_checker_passes_what_is_right(what: str, gpu: str, tmp_path: Path) -> None:
    kernel = planted(RIGHT[what], [], tmp_path, gpu)
    assert ptx.violations(kernel) == []
    assert len(ptx.expansions(kernel)) >= RIGHT[what].count("fn_rsqrt")


@each_gpu
@pytest.mark.parametrize("what", WRONG)
def test_the_checker_finds_what_is_wrong(what: str, gpu: str, tmp_path: Path) -> None:
    body, flags = WRONG[what]
    assert ptx.violations(planted(body, flags, tmp_path, gpu)) != []


# ---- the extension -------------------------------------------------------------------------------------------------

BUILT = fusednorm.info()["cuda"]["built"]
extension_with_cuda = pytest.mark.skipif(not BUILT, reason="the extension was built without CUDA")


def extension() -> Path:
    assert _core.__file__ is not None
    return Path(_core.__file__)


@extension_with_cuda
def test_the_extension_is_small() -> None:
    size = extension().stat().st_size
    print(f"\n{extension().name}: {size / 2**20:.2f} MiB")
    assert size < MAX_MODULE_BYTES


@extension_with_cuda
@pytest.mark.skipif(sys.platform != "linux", reason="ELF only")
def test_the_extension_needs_no_cuda_library() -> None:
    """Neither the runtime, which is inside, nor the driver's library, which may be absent, nor that of C++."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed (Debian: binutils)")
    text = subprocess.run(["readelf", "-d", str(extension())], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    assert any(name.startswith("libc.so") for name in needed), "this is not the list of needed libraries"
    assert [name for name in needed if re.match(r"lib(cuda|nv|stdc\+\+)", name)] == []


@extension_with_cuda
def test_the_architectures_are_those_that_info_names() -> None:
    lister = tool("cuobjdump")
    found = set()
    for option, suffix in (("--list-elf", ""), ("--list-ptx", "-ptx")):
        text = subprocess.run([lister, option, str(extension())], capture_output=True, text=True).stdout
        found |= {f"{name}{suffix}" for name in re.findall(r"\.sm_(\w+)\.(?:cubin|ptx)", text)}
    assert found == set(fusednorm.info()["cuda"]["architectures"])


@extension_with_cuda
def test_the_machine_code_moves_16_bytes() -> None:
    # The newest GPU's, of those whose code has the norms: 90a has products alone where 90 is there too.
    names = [name for name in fusednorm.info()["cuda"]["architectures"] if not name.endswith("-ptx")]
    newest = [name for name in names if name != "90a" or "90" not in names][-1]
    for name, code in machine_code(extension(), "-arch", f"sm_{newest}").items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
        if "strided" not in name and "MUFU.RSQ" in code:
            assert re.search(r"\bLDG\S*\.128\b", code), f"{name}: no 128-bit load"
            assert re.search(r"\bSTG\S*\.128\b", code), f"{name}: no 128-bit store"
