"""The CUDA half of the build, for setup.py: which toolkit, for which GPUs, with which flags. Standard library only."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path
from typing import NamedTuple

# One rounded operation per operation of the source, as BIT_FLAGS in setup.py. What the environment adds
# (NVCC_APPEND_FLAGS) comes after these and may win: check_bits looks.
BIT_FLAGS = ["-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
# A kernel's stub is C++ on the host. Without exceptions, and without its guarded static (the macro is that of CUDA 13's
# crt/host_runtime.h), it needs no libstdc++; link_flags names that for where it is needed after all.
HOST_FLAGS = "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-fno-exceptions,-D__NV_LEGACY_LAUNCH"
FLAGS = ["-O3", "-std=c++17", *BIT_FLAGS, HOST_FLAGS, "-Icsrc"]

ONLY_90A = "_sm90a.cu"  # how a source ends whose instructions no GPU but compute capability 9.0 has

OLDEST_NVCC = (12, 4)
DEFAULT_ARCHITECTURES = "80 86 89 90 100 120"
LISTS = ("FUSEDNORM_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS")

# In PTX, each of these is one rounded operation unless a flag has changed its meaning.
PROBE = """
extern "C" __global__ void fusednorm_probe(float *a, float b) {
    a[0] = a[0] * b + a[1];
    a[1] = __fdiv_rn(a[1], b) + a[2] / b + sqrtf(b);
}
extern "C" int fusednorm_probe_devices(void) {
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
}
"""


class Toolkit(NamedTuple):
    nvcc: str
    version: tuple[int, int]
    includes: list[str]
    cudart: str  # libcudart_static.a


def say(text: str) -> None:
    print(f"fusednorm: {text}", file=sys.stderr, flush=True)


def switch(name: str) -> str:
    """The variable's value, of "0", "1" and "" (unset)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"fusednorm: {name} is {value!r}: must be 0 (off), 1 (required) or unset")
    return value


def count(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise SystemExit(f"fusednorm: {name} is {text!r}: must be a number, 1 or more")
    return int(text)


def output_of(command: list[str]) -> tuple[bool, str]:
    """Whether the command succeeded, and all that it said."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        return False, str(error)
    return result.returncode == 0, result.stdout.strip()


# ---- which toolkit -------------------------------------------------------------------------------------------------


def nvcc_candidates() -> list[tuple[str, str | None]]:
    """The places of nvcc in the order in which they are tried, in words, each with a path, or None if it has none."""
    places: list[tuple[str, str | None]] = []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            places.append((f"{name}={os.environ[name]}", f"{os.environ[name]}/bin/nvcc"))
    places.append(("the PATH", shutil.which("nvcc")))
    places.append(("/usr/local/cuda", "/usr/local/cuda/bin/nvcc"))
    # An isolated build does not import the environment's packages, but their folder is where it was.
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    packaged = [name for folder in dict.fromkeys(folders) for name in sorted(glob(f"{folder}/nvidia/c*/bin/nvcc"))]
    words = "the packages nvidia-cuda-nvcc and nvidia-cuda-runtime"
    places += [(words, name) for name in reversed(packaged)] or [(words, None)]
    return [(words, path if path and os.access(path, os.X_OK) else None) for words, path in places]


def read_toolkit(nvcc: str) -> Toolkit | str:
    """What nvcc says about itself and where it looks for files, or why it cannot be used."""
    ok, text = output_of([nvcc, "--version"])
    release = re.search(r"\brelease (\d+)\.(\d+)", text)
    if not ok or not release:
        return f"{nvcc} --version: {text or 'no answer'}"
    version = (int(release[1]), int(release[2]))
    if version < OLDEST_NVCC:
        return f"{nvcc} is {release[1]}.{release[2]}: must be {'.'.join(map(str, OLDEST_NVCC))} or newer"
    _, plan = output_of([nvcc, "-dryrun", "fusednorm.cu"])
    found = {name: shlex.split(words) for name, words in re.findall(r"^#\$ (\w+)=(.*)$", plan, re.MULTILINE)}
    includes = [os.path.realpath(word[2:]) for word in found.get("INCLUDES", []) if word.startswith("-I")]
    libraries = [word[2:] for word in found.get("LIBRARIES", []) if word.startswith("-L")]
    root = found.get("TOP", [f"{nvcc}/../.."])[0]
    libraries += [f"{root}/lib64", f"{root}/lib"]  # nvcc from PyPI names the first, its files are in the second
    archives = [Path(folder, "libcudart_static.a") for folder in libraries]
    cudart = next((str(path.resolve()) for path in archives if path.is_file()), None)
    if cudart is None:
        return f"{nvcc} finds no libcudart_static.a in {', '.join(libraries)}"
    return Toolkit(nvcc, version, includes, cudart)


def try_toolkit(toolkit: Toolkit, linker: list[str]) -> str | None:
    """Compiles and links a probe; the reason why that fails."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE)
        nvcc = [toolkit.nvcc, *FLAGS, str(source), "-o"]
        link = [*linker, f"{folder}/probe.o", "-o", f"{folder}/probe.so", *link_flags(toolkit), "-Wl,-z,defs"]
        for command in ([*nvcc, f"{folder}/probe.ptx", "-ptx"], [*nvcc, f"{folder}/probe.o", "-c"], link):
            ok, text = output_of(command)
            if not ok:
                return f"{shlex.join(command)} failed:\n{text}"
        check_bits(Path(folder, "probe.ptx").read_text())
    return None


def check_bits(ptx: str) -> None:
    """Refuses fast math, which defines no macro, and its parts: by what they do, wherever they were asked for."""
    changed = re.findall(r"\b(?:fma|[\w.]+\.(?:ftz|approx|full))\b[\w.]*", ptx)
    if changed or "div.rn.f32" not in ptx:
        variables = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
        culprits = [f"{name}={os.environ[name]!r}" for name in variables if name in os.environ]
        raise SystemExit(
            f"fusednorm: nvcc makes {', '.join(dict.fromkeys(changed))} of single IEEE operations in spite of "
            f"{' '.join(BIT_FLAGS)}: leave out what asks for it ({', '.join(culprits) or 'nvcc.profile'})"
        )


def link_flags(toolkit: Toolkit) -> list[str]:
    """The CUDA runtime inside the module, its symbols hidden; it looks for the driver when it is first called."""
    hidden = f"-Wl,--exclude-libs,{Path(toolkit.cudart).name}"
    if_needed = "-Wl,--push-state,--as-needed,-lstdc++,--pop-state"
    # The names of hundreds of kernels' stubs are a tenth of the module: they stay for who debugs it.
    strip = [] if "-g" in os.environ.get("CFLAGS", "") else ["-Wl,-s"]
    return [toolkit.cudart, hidden, *strip, "-ldl", "-lrt", "-lpthread", if_needed]


def find_toolkit(linker: list[str]) -> Toolkit | None:
    """What FUSEDNORM_CUDA asks for; `linker` makes a shared object of object files."""
    wanted = switch("FUSEDNORM_CUDA")
    if wanted == "0":
        say("CUDA: off, because FUSEDNORM_CUDA=0: arrays on the CPU only")
        return None
    reasons, seen = [], set()
    for place, nvcc in nvcc_candidates():
        if nvcc is None:
            reasons.append(f"{place}: no nvcc")
        elif os.path.realpath(nvcc) not in seen:
            seen.add(os.path.realpath(nvcc))
            toolkit = read_toolkit(nvcc)
            reason = toolkit if isinstance(toolkit, str) else try_toolkit(toolkit, linker)
            if reason is None:
                for passed_over in (text for text in reasons if text.startswith("CUDA_")):
                    say(f"CUDA: {passed_over}: passed over")
                return toolkit
            reasons.append(f"{place}: {reason}")
    looked_for = "".join(f"\n  {reason}" for reason in reasons)
    if wanted == "1":
        raise SystemExit(f"fusednorm: FUSEDNORM_CUDA=1, but no CUDA toolkit can be used. Looked for:{looked_for}")
    say(f"CUDA: no toolkit found that can be used: arrays on the CPU only. Looked for:{looked_for}")
    return None


# ---- which GPUs ----------------------------------------------------------------------------------------------------


def architectures(known: list[str]) -> list[str]:
    """Names such as "80", "90a" (code for that GPU) and "120-ptx", sorted. `known` are the numbers that nvcc knows."""
    chosen = next((name for name in LISTS if os.environ.get(name)), None)
    words = re.split(r"[\s,;]+", (os.environ[chosen] if chosen else DEFAULT_ARCHITECTURES).strip(" ,;\t\n"))
    if chosen is None and not set(words) <= set(known):
        say(f"CUDA: this nvcc does not know {', '.join(word for word in words if word not in known)}: left out")
        words = [word for word in words if word in known]
    named, code, virtual = set(), set(), set()
    for word in words:
        match = re.fullmatch(r"(\d+)(?:\.(\d))?([af]?)(\+PTX|-ptx|-real|-virtual)?", word)
        if not match:
            raise SystemExit(
                f"fusednorm: {chosen} is {os.environ.get(chosen or '')!r}: {word!r} is not an architecture: must be "
                "compute capabilities such as 80;90, 8.0 9.0+PTX or 90-real,120-virtual"
            )
        number = match[1] + (match[2] or "")
        if number not in known:
            raise SystemExit(f"fusednorm: {chosen}: nvcc does not know {word!r}: must be among {', '.join(known)}")
        name = number + match[3]
        named.add(match[4] or "")
        if match[4] not in ("-ptx", "-virtual"):
            code.add(name)
        if match[4] in ("+PTX", "-ptx", "-virtual"):
            virtual.add(name)
    if named == {""}:  # 90a is for no other GPU, not even as PTX
        virtual |= set(sorted(filter(str.isdigit, code), key=int)[-1:])
    ordered = [sorted(names, key=lambda name: (int(name.rstrip("af")), name)) for names in (code, virtual)]
    return [*ordered[0], *(f"{name}-ptx" for name in ordered[1])]


def known_architectures(toolkit: Toolkit) -> list[str]:
    numbers = re.findall(r"\bsm_(\d+)\b", output_of([toolkit.nvcc, "--list-gpu-code"])[1])
    return sorted(dict.fromkeys(numbers), key=int)


def generate_code(names: list[str]) -> list[str]:
    flags = []
    for name in names:
        number, kind = name.removesuffix("-ptx"), "compute" if name.endswith("-ptx") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def runs_90a(names: list[str]) -> bool:
    """Whether machine code for compute capability 9.0 is wanted: then the sources ONLY_90A are compiled too."""
    return bool({"90", "90a"} & set(names))


def with_90a(names: list[str]) -> list[str]:
    """What the module has code for when they are."""
    if "90a" in names:
        return names
    after = names.index("90") + 1
    return [*names[:after], "90a", *names[after:]]


# ---- nvcc ----------------------------------------------------------------------------------------------------------


def command_for(toolkit: Toolkit, names: list[str]) -> list[str]:
    """nvcc, for a source and an output yet to be named."""
    compress = ["--compress-mode=size"] if toolkit.version >= (12, 8) else []
    return [toolkit.nvcc, *FLAGS, *generate_code(names), *compress]


def compile_source(nvcc: list[str], source: str, threads: int) -> str:
    """One object, kept in build/cuda with a digest of all that it was made of: for many GPUs it takes minutes."""
    target = Path("build", "cuda", f"{Path(source).name}.o")
    key = target.with_suffix(".key")
    environment = {name: value for name, value in os.environ.items() if name.startswith("NVCC_")}
    digest = hashlib.sha256(repr((nvcc, output_of([nvcc[0], "--version"]), environment)).encode())
    for name in [source, *sorted(glob("csrc/*.h") + glob("csrc/cuda/*.h") + glob("csrc/cuda/*.cuh"))]:
        digest.update(f"\0{name}\0".encode() + Path(name).read_bytes())
    if target.is_file() and key.is_file() and key.read_text() == digest.hexdigest():
        say(f"CUDA: {source} has not changed: {target} is kept")
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    key.unlink(missing_ok=True)
    command = [*nvcc, f"--threads={threads}", "-c", source, "-o", str(target)]
    print(shlex.join(command), flush=True)
    ok, text = output_of(command)
    if text:
        print(text, file=sys.stderr, flush=True)
    if not ok:
        raise SystemExit(f"fusednorm: nvcc cannot compile {source}; what it said is above")
    key.write_text(digest.hexdigest())
    return str(target)
