"""Native and generated parts of the build; everything else is in pyproject.toml.

* ``protos/steerserve/v1/*.proto`` becomes ``steerserve/v1/*_pb2.py``, ``*_pb2_grpc.py`` and their ``.pyi``.
  The proto path *is* the package path, so that the imports protoc writes resolve as they stand:
  ``from steerserve.v1 import generation_pb2, generation_pb2_grpc``. Generated code is never committed.
* ``csrc/**/*.cpp`` becomes ``steerserve.kernels._C``, compiled by ninja. A source named ``*_avx2.cpp`` or
  ``*_avx512.cpp`` gets that instruction set, all others the baseline of the platform: the binary runs on any
  x86-64 and picks its path at run time. OpenMP pragmas are compiled, but no OpenMP runtime is linked: the
  symbols bind to the runtime that torch has loaded (see ``steerserve/kernels/native.py``).
"""

from __future__ import annotations

import os
import platform
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
}


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
        build_dir = Path(self.build_temp).resolve()
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
    """The whole build as a ninja file: one compile per source, one link."""
    import pybind11

    cxx = os.environ.get("CXX", "g++")
    includes = [ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
    flags = " ".join(
        [
            CXX_FLAGS,
            os.environ.get("CXXFLAGS", ""),
            *(f'-isystem "{path}"' if path != ROOT / "csrc" else f'-I"{path}"' for path in includes),
        ]
    )
    lines = [
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {flags} $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared $in -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(f"{source}.o")
        isa = next((flags for suffix, flags in ISA_FLAGS.items() if source.endswith(suffix)), "")
        lines += [f"build {objects[-1]}: cxx {ninja_path(ROOT / source)}", f"  isa = {isa}"]
    lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def ninja_path(path: Path) -> str:
    """``path`` with ninja's special characters escaped."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def native_sources() -> list[str]:
    """Sources of the extension, relative to the root; instruction-set files only where they can run."""
    is_x86 = platform.machine() in {"x86_64", "AMD64"}
    paths = (path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp"))
    return sorted(path for path in paths if is_x86 or not path.endswith(tuple(ISA_FLAGS)))


setup(
    ext_modules=[Extension("steerserve.kernels._C", sources=native_sources())],
    cmdclass={"build_py": BuildWithProtos, "build_ext": NinjaBuildExt},
)
