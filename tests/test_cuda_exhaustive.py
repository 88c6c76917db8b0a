"""1/sqrt and the conversions of the CUDA kernels over every encoding, against the CPU (proof: test_c_programs.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import build_c
import helpers
import pytest
from test_c_programs import OPENMP, THREADS, has_openmp

import fusednorm

helpers.require_cuda()

# As setup.py compiles the kernels: no contraction, and nothing flushed or approximated.
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]


def find_nvcc() -> str:
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if folder and Path(folder, "bin", "nvcc").is_file():
            return str(Path(folder, "bin", "nvcc"))
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return found or pytest.skip("no nvcc: set CUDA_HOME or put it on the PATH")


def build(architecture: str) -> Path:
    openmp = OPENMP if has_openmp() else []
    flags = ["-O3", "-shared", "-fPIC", *THREADS, *openmp]
    host = build_c.build_program("libexhaustive_host.so", ["exhaustive_host.c"], flags)
    source = build_c.TESTS_C / "exhaustive.cu"
    include = [f"-I{build_c.ROOT / 'csrc'}", f"-I{build_c.TESTS_C}"]
    command = [find_nvcc(), *NVCC_FLAGS, f"-arch={architecture}", *include, str(source), str(host)]
    return build_c.cached("exhaustive", command, [source, host])


@pytest.mark.exhaustive
def test_every_encoding() -> None:
    if not build_c.have_compiler():
        pytest.skip("no C compiler: set CC or install one")
    capability = fusednorm.info()["cuda"]["devices"][0]["compute_capability"]
    program = build(f"sm_{capability.replace('.', '')}")
    done = subprocess.run([program], check=False, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(count) for count in re.findall(r"(\d+) encodings, all as on the CPU", done.stdout)]
    assert counts == [2**31, 2**32, 2**32, 2**16, 2**16]
