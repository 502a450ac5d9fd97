"""Native and generated parts of the build; everything else is in pyproject.toml.

* ``protos/steerserve/v1/*.proto`` becomes ``steerserve/v1/*_pb2.py``, ``*_pb2_grpc.py`` and their ``.pyi``.
  The proto path *is* the package path, so that the imports protoc writes resolve as they stand:
  ``from steerserve.v1 import generation_pb2, generation_pb2_grpc``. Generated code is never committed.
* ``csrc/*.cpp`` and ``csrc/cpu/*.cpp`` become ``steerserve.kernels._C``, compiled by ninja. A source named
  ``*_avx2.cpp``, ``*_avx512.cpp``, ``*_avx512_bf16.cpp`` or ``*_amx.cpp`` gets that instruction set, all others the
  baseline of the platform: the binary runs on any x86-64 and picks its path at run time. OpenMP pragmas are compiled,
  but no OpenMP runtime is linked: the symbols bind to the runtime that torch has loaded (see
  ``steerserve/kernels/native.py``).
* ``csrc/cuda/*`` becomes ``steerserve.kernels._cuda`` where nvcc is found; no GPU is needed or asked for. The CUDA
  runtime is linked statically, so that the module loads everywhere. ``STEERSERVE_CUDA=1`` makes a missing nvcc an
  error, ``0`` builds without.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PROTO_PACKAGE = "steerserve.v1"
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra"
ISA_FLAGS = {
    "_avx2.cpp": "-mavx2 -mfma",
    # g++ 12 warns about its own intrinsics (GCC bug 105593).
    "_avx512.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -Wno-uninitialized -Wno-maybe-uninitialized",
    "_avx512_bf16.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mavx512bf16 "
    "-Wno-uninitialized -Wno-maybe-uninitialized",
    "_amx.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mamx-tile -mamx-bf16 "
    "-Wno-uninitialized -Wno-maybe-uninitialized",
}
CUDA_ARCHITECTURES = (80, 90, 100, 120)
# A kernel that spills registers or indexes local memory must not be built without anyone noticing.
NVCC_FLAGS = (
    "-std=c++17 -O3 -Werror all-warnings -Xptxas -Werror,-warn-spills,-warn-lmem-usage "
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra "
    + " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES)
    # For cards newer than the newest: compiled by their driver.
    + f" -gencode arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}"
)


class BuildWithProtos(build_py):
    """build_py that generates the package ``steerserve.v1`` first."""

    def run(self) -> None:
        generate_protos()
        # Only now: in a fresh checkout the package did not exist when packages were looked for.
        self.packages = sorted({*self.packages, PROTO_PACKAGE})
        super().run()


class NinjaBuildExt(build_ext):
    """build_ext whose compiler is ninja: parallel, and incremental where the build directory is kept."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / ext.name
        target.parent.mkdir(parents=True, exist_ok=True)
        build_dir.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(sorted(ext.sources), target))
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build_dir], check=True)


def generate_protos() -> None:
    """Run protoc over every file of the wire contract."""
    import grpc_tools

    package_dir = ROOT.joinpath(*PROTO_PACKAGE.split("."))
    package_dir.mkdir(exist_ok=True)
    (package_dir / "__init__.py").write_text('"""Generated from protos/ at build time."""\n')
    protos = sorted((ROOT / "protos").joinpath(*PROTO_PACKAGE.split(".")).glob("*.proto"))
    includes = [ROOT / "protos", Path(grpc_tools.__file__).parent / "_proto"]
    outputs = ["python", "grpc_python", "mypy", "mypy_grpc"]
    # protoc finds its mypy plugins on PATH, which lacks the scripts of a virtual environment that is not active.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            *(f"-I{include}" for include in includes),
            *(f"--{output}_out={ROOT}" for output in outputs),
            *map(str, protos),
        ],
        check=True,
        env={**os.environ, "PATH": path},
    )


def ninja_file(sources: list[str], target: Path) -> str:
    """The whole build of one extension as a ninja file: one compile per source, one link."""
    import pybind11

    cxx = os.environ.get("CXX", "g++")
    system_includes = [sysconfig.get_path("include"), pybind11.get_include()]
    includes = " ".join([f'-I"{ROOT / "csrc"}"', *(f'-isystem "{path}"' for path in system_includes)])
    if any(source.endswith(".cu") for source in sources):
        compile_command = f"{find_nvcc()} -ccbin {cxx} -MD {NVCC_FLAGS}"
        # The runtime's symbols stay inside: torch may have loaded another version of it.
        link_command = f"{find_nvcc()} -ccbin {cxx} -shared --no-device-link -cudart static -Xlinker --exclude-libs,ALL"
    else:
        compile_command = f"{cxx} -MMD {CXX_FLAGS} {os.environ.get('CXXFLAGS', '')}"
        link_command = f"{cxx} -shared"
    lines = [
        "rule compile",
        f"  command = {compile_command} -MF $out.d {includes} $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link_command} $in -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(f"{source}.o")
        isa = next((flags for suffix, flags in ISA_FLAGS.items() if source.endswith(suffix)), "")
        lines += [f"build {objects[-1]}: compile {ninja_path(ROOT / source)}", f"  isa = {isa}"]
    lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def ninja_path(path: Path) -> str:
    """``path`` with ninja's special characters escaped."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


@functools.cache
def find_nvcc() -> Path | None:
    """The CUDA compiler, if it is to be used; ``STEERSERVE_CUDA`` decides where set."""
    wanted = os.environ.get("STEERSERVE_CUDA", "")
    if wanted not in {"", "0", "1"}:
        raise SystemExit(f"STEERSERVE_CUDA={wanted}: expected 0 or 1")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=os.pathsep.join([f"{home}/bin", os.environ["PATH"]]))
    if found:
        known = subprocess.run([found, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        if {f"compute_{arch}" for arch in CUDA_ARCHITECTURES} <= set(known):
            return Path(found)
    problem = f"{found} is older than CUDA 12.8" if found else "no nvcc in CUDA_HOME, /usr/local/cuda or PATH"
    if wanted == "1":
        raise SystemExit(f"STEERSERVE_CUDA=1, but {problem}")
    print(f"steerserve: {problem}; building without CUDA kernels", file=sys.stderr)
    return None


def extensions() -> list[Extension]:
    """The compiled modules, with sources relative to the root."""
    is_x86 = platform.machine() in {"x86_64", "AMD64"}
    cpu = [path for path in sources("*.cpp", "cpu/*.cpp") if is_x86 or not path.endswith(tuple(ISA_FLAGS))]
    modules = [Extension("steerserve.kernels._C", sources=cpu)]
    if find_nvcc():
        modules.append(Extension("steerserve.kernels._cuda", sources=sources("cuda/*.cpp", "cuda/*.cu")))
    return modules


def sources(*patterns: str) -> list[str]:
    """Files of csrc that match, relative to the root."""
    found = (path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


setup(ext_modules=extensions(), cmdclass={"build_py": BuildWithProtos, "build_ext": NinjaBuildExt})
