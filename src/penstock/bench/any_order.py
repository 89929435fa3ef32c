"""The library of ``penstock bench determinism``: the product's kernels and the same sources with sums in any order."""

from __future__ import annotations

import ctypes
import hashlib
import shlex
import shutil
import subprocess
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from penstock.base import ConfigError, EngineError
from penstock.bench.contenders import machine

SOURCES = Path(__file__).resolve().parents[3] / "csrc"
"""Where they are in a checkout; a wheel has none."""
COMPILERS = ("g++", "c++", "clang++")

AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c"
FLAGS = {
    "amx": f"{AVX512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8",
    "avx512_bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
    "avx512_vnni": f"{AVX512} -mavx512vnni",
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma -mf16c",
    "i8mm": "-march=armv8.2-a+dotprod+i8mm",
    "dotprod": "-march=armv8.2-a+dotprod",
    "portable": "",
}
"""What the product is compiled with for each set of kernels (CMakeLists.txt)."""
GNU_LEVEL = "-O2 -fvect-cost-model=dynamic -fpeel-loops"
"""What CMakeLists.txt asks GCC for; others get -O3."""

LONG_SEGMENT = 512
"""Keys of an attention segment where they are free: the scores of a prompt's rows just stay in a second-level cache."""

BUILDS = {
    "in_order": "{flags} -ffp-contract=off",
    "any_order": f"{{flags}} -DPENSTOCK_ANY_ORDER={LONG_SEGMENT}",
    "any_order_fast_math": f"{{flags}} -march=native -ffast-math -DPENSTOCK_ANY_ORDER={LONG_SEGMENT}",
}
"""Name of a build and its own flags; the first is the product."""

DIFFERENCE = f"""\
in order   the product's sources and flags: K ascending in one chain for each output, row-parallel sums in S segments
           that add along a tree, attention in segments of 128 keys that merge along a tree over absolute positions
any order  the faster of two builds, line by line. Both: S = 1; products of one row in several chains of sums,
           K cut for threads where outputs are few; attention segments of {LONG_SEGMENT} keys, merged as they come,
           cut for threads only where heads are few. any_order_fast_math: also -ffast-math -march=native. Formats,
           roundings of inputs and layout of weights are the same"""


def build_library(work: Path, chosen: str, sources: Path = SOURCES) -> Path:
    """Compiles, unless it is there, for the set of kernels ``chosen``. A minute or two.

    Raises:
        ConfigError: (compiler_missing), (native_sources_missing).
        EngineError: (bench_build_failed) the compiler refused.
    """
    files = sorted([*(sources / "cpu").glob("*"), *(sources / "bench").glob("*")])
    if not files:
        raise ConfigError(
            "native_sources_missing",
            "The sources of the native kernels are not here",
            why=f"{sources} has no cpu and bench; a wheel comes without them",
            fix="run it from a checkout that is installed with pip install -e",
        )
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise ConfigError(
            "compiler_missing",
            "The kernels with sums in any order cannot be built",
            why=f"none of {', '.join(COMPILERS)} is on the PATH",
            fix="install a C++ compiler (apt install g++)",
        )
    version = _run([compiler, "--version"])
    level = GNU_LEVEL if "Free Software Foundation" in version else "-O3"
    common = [compiler, "-std=c++20", *level.split(), "-fPIC", "-fvisibility=hidden", f"-I{sources / 'cpu'}"]
    builds = {name: flags.format(flags=FLAGS[chosen]) for name, flags in BUILDS.items()}
    known = hashlib.blake2b(repr((version, common, builds, machine())).encode(), digest_size=8)
    for file in files:
        known.update(file.read_bytes())
    folder = work / f"determinism-{known.hexdigest()}"
    library = folder / "kernels.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    for name, flags in builds.items():
        own = [f"-DPENSTOCK_ISA={name}", *flags.split()]
        _run([*common, *own, "-c", str(sources / "cpu" / "kernels.cpp"), "-o", str(folder / f"{name}.o")])
    rest = [str(sources / "cpu" / "pool.cpp"), str(sources / "bench" / "determinism.cpp")]
    part = folder / "part.so"
    _run([*common, "-shared", "-pthread", *(str(folder / f"{name}.o") for name in builds), *rest, "-o", str(part)])
    return part.rename(library)


def load_library(path: Path, threads: int) -> ctypes.CDLL:
    """``linear`` and ``attention`` of ``csrc/bench/determinism.cpp``; the first argument is a place in BUILDS."""
    library = ctypes.CDLL(str(path))
    address: Any = c_void_p
    size: Any = c_int64
    library.linear.argtypes = [c_int, address, address, address, *[size] * 3, c_int, c_int, c_bool, *[c_int] * 3]
    places = [address] * 5 + [size, size, address, address]
    library.attention.argtypes = [c_int, *places, size, size, size, c_float, c_int]
    library.linear.restype = library.attention.restype = library.use_threads.restype = None
    library.use_threads(threads)
    return library


def _run(argv: list[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = f"exit code {done.returncode}; {done.stderr.strip()[-1500:]}"
        fix = f"run it by itself: {shlex.join(argv)}"
        raise EngineError("bench_build_failed", "The kernels with sums in any order were not built", why=why, fix=fix)
    return done.stdout
