"""The compiled extension, loaded so that it shares torch's OpenMP runtime.

torch ships its own OpenMP library. The extension is linked against none: were it to bring a second one, both
would start a thread per core and each would ignore the other's thread count. Its OpenMP symbols bind to the
library that torch has loaded, once that library is made visible to later loads.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

_OPENMP_LIBRARY = re.compile(r"\s(/\S*/lib(?:gomp|iomp5|omp)[-.][^/\s]*)$", re.MULTILINE)


def loaded_openmp_libraries() -> list[Path]:
    """OpenMP libraries mapped into this process, torch's own first."""
    maps = Path("/proc/self/maps").read_text()
    torch_home = Path(torch.__file__).parent.parent
    libraries = {Path(path) for path in _OPENMP_LIBRARY.findall(maps)}

    def is_foreign(library: Path) -> bool:
        return not library.is_relative_to(torch_home) or not library.relative_to(torch_home).parts[0].startswith(
            "torch"
        )

    return sorted(libraries, key=lambda library: (is_foreign(library), library))


def _share_openmp() -> None:
    loaded = loaded_openmp_libraries()
    library = str(loaded[0]) if loaded else "libgomp.so.1"
    ctypes.CDLL(library, mode=os.RTLD_GLOBAL)


_share_openmp()

from steerserve.kernels import _C as C  # noqa: E402  (its symbols resolve only now)

__all__ = ["C", "loaded_openmp_libraries"]
