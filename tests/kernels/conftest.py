"""What every kernel test may use. ``kernel_cases`` and ``kernel_formulas`` lie beside the tests that import them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steerserve.kernels.native import C

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("kernel_formulas", "kernel_cases")

LEVELS = sorted({"scalar", "avx2", "avx512", *C.supported_simd_levels()})


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every instruction set."""
    if request.param not in C.supported_simd_levels():
        pytest.skip(f"this CPU has no {request.param}")
    best = C.simd_level()
    C.set_simd_level(request.param)
    yield request.param
    C.set_simd_level(best)


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Enough threads to show that none of them matters, however many cores there are."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(num_threads)
