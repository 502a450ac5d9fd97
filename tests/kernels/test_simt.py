"""The CUDA kernels, compiled by g++ and run on a CPU: csrc/simt emulates what csrc/cuda/*.cuh name of CUDA.

Each driver csrc/simt/test_*.cpp checks one operator against its definition in float64, in three builds: plain, in three
orders of threads; with ASan and UBSan; and with TSan, for which only barriers and fences order memory. The canaries
show that the builds see the bugs they are there for, and the mutants that the drivers would see a missing barrier.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
OPS = ["steer_delta", "head_scale", "sae_decode", "sae_encode", "sae_splice"]
FLAGS = "-std=c++17 -O1 -g -fno-strict-aliasing -fno-omit-frame-pointer -Wall -Wextra -Werror -Wno-unknown-pragmas"
BUILDS = {
    "plain": ("", ""),
    "asan": ("-fsanitize=address,undefined -fno-sanitize-recover=all", "-DSIMT_ASAN=1"),
    "tsan": ("-fsanitize=thread", "-DSIMT_TSAN=1"),
}
"""For each build, more flags for kernels and drivers, and for the engine, which is not instrumented."""
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0"}
BARRIER = re.compile(r"__sync(threads|warp)\(\);")

CANARIES = {
    ("missing_barrier", "plain"): "wrong result",
    ("missing_barrier", "tsan"): "data race",
    ("missing_barrier_before_reuse", "plain"): "wrong result",
    ("missing_barrier_before_reuse", "tsan"): "data race",
    ("missing_syncwarp", "tsan"): "data race",
    ("shuffle_as_syncwarp", "tsan"): "data race",
    ("divergent_shuffle", "plain"): "deadlock.*__shfl_xor_sync",
    ("shuffle_from_returned_lane", "plain"): "lane 31 is read but does not take part",
    ("lane_outside_its_mask", "plain"): "not in its own mask: __ballot_sync",
    ("barrier_in_a_branch", "plain"): "deadlock.*__syncthreads.*__syncthreads",
    ("returned_before_barrier", "plain"): "480 threads have returned before __syncthreads",
    ("unguarded_histogram", "tsan"): "data race",
    ("uninitialized_shared", "plain"): "wrong result",
    ("shared_overrun", "asan"): "heap-buffer-overflow",
    ("dynamic_shared_overrun", "asan"): "heap-buffer-overflow",
    ("global_overrun", "asan"): "heap-buffer-overflow",
    ("misaligned_vector", "asan"): "misaligned address",
    ("shift_too_far", "asan"): "shift exponent 32",
    ("race_between_blocks", "tsan"): "data race",
    ("missing_fence_before_flag", "tsan"): "data race",
    ("missing_fence_after_flag", "tsan"): "data race",
    ("unasked_shared", "plain"): "launch refused",
}
"""What has to see the bug of each canary, and how it is reported."""


Result = subprocess.CompletedProcess[str]


class Emulator:
    """Builds drivers and runs them, two at a time: a test waits for its own while others go on."""

    def __init__(self, cuda_include: Path, directory: Path) -> None:
        self.pool = ThreadPoolExecutor(2)
        self._directory = directory
        self._cuda = f"-isystem {cuda_include} -include simt/simt.h"
        for engine in [self.pool.submit(self._compile_engine, build) for build in BUILDS]:
            engine.result()

    def submit(self, driver: str, build: str, csrc: Path = CSRC) -> Future[Result]:
        """Compile and run a driver, with the device code that lies in ``csrc``."""
        return self.pool.submit(lambda: run(self.compile(driver, build, csrc)))

    def compile(self, driver: str, build: str, csrc: Path = CSRC) -> Path:
        executable = self._directory / f"{driver}-{build}-{csrc.name}"
        flags = f"{FLAGS} {BUILDS[build][0]} -I{csrc} -I{CSRC} {self._cuda}"
        compile_(flags, CSRC / f"simt/{driver}.cpp", self._engine(build), "-o", executable)
        return executable

    def without_barrier(self, path: str, index: int) -> Path:
        """A copy of the device code that lacks one barrier."""
        csrc = self._directory / f"{Path(path).stem}-{index}"
        shutil.copytree(CSRC / "cuda", csrc / "cuda")
        call = barriers(path)[index]
        (csrc / path).write_text(call.string[: call.start()] + "{}" + call.string[call.end() :])
        return csrc

    def _engine(self, build: str) -> Path:
        return self._directory / f"engine-{build}.o"

    def _compile_engine(self, build: str) -> None:
        flags = f"{FLAGS} {BUILDS[build][1]} -I{CSRC} {self._cuda}"
        compile_(flags, "-c", CSRC / "simt/engine.cpp", "-o", self._engine(build))


def compile_(flags: str, *arguments: str | Path) -> None:
    done = subprocess.run(["g++", *flags.split(), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def run(executable: Path, *arguments: str) -> Result:
    # The TSan of g++ 12 finds no room for itself where a kernel randomizes 32 bits of addresses.
    fixed_addresses = ["setarch", "-R"] if "tsan" in executable.name and can_fix_addresses() else []
    return subprocess.run(
        [*fixed_addresses, executable, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **SANITIZER_OPTIONS},
    )


def can_fix_addresses() -> bool:
    return (
        bool(shutil.which("setarch")) and subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0
    )


def barriers(path: str) -> list[re.Match[str]]:
    return list(BARRIER.finditer((CSRC / path).read_text()))


def find_cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    includes = (Path(home) / "include" for home in homes if home)
    return next((include for include in includes if (include / "cuda_bf16.h").exists()), None)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    cuda_include = find_cuda_include()
    missing = [
        what
        for what, is_there in {
            "x86-64 Linux": platform.system() == "Linux" and platform.machine() == "x86_64",
            "g++": shutil.which("g++"),
            "the headers of the CUDA toolkit": cuda_include,
        }.items()
        if not is_there
    ]
    if missing and os.environ.get("STEERSERVE_CUDA") == "1":
        pytest.fail(f"STEERSERVE_CUDA=1 demands that kernels are tested, which needs {', '.join(missing)}")
    if cuda_include is None or missing:
        pytest.skip(f"emulating CUDA needs {', '.join(missing)}")
    made = Emulator(cuda_include, tmp_path_factory.mktemp("simt"))
    yield made
    made.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def kernel_runs(request: pytest.FixtureRequest, emulator: Emulator) -> dict[tuple[str, str], Future[Result]]:
    """The runs of all drivers that this session is going to ask for, under way."""
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == "test_kernel"]
    wanted = [(item.callspec.params["op"], item.callspec.params["build"]) for item in tests]
    return {(op, build): emulator.submit(f"test_{op}", build) for op, build in wanted}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("op", OPS)
def test_kernel(op: str, build: str, kernel_runs: dict[tuple[str, str], Future[Result]]) -> None:
    done = kernel_runs[op, build].result()
    assert done.returncode == 0, (done.stdout + done.stderr)[:8000]
    assert re.search(r"^[1-9]\d* tests, [1-9]\d* checks, 0 failures$", done.stdout, re.MULTILINE)
    assert not done.stderr


@pytest.fixture(scope="session")
def canaries(emulator: Emulator) -> dict[str, Path]:
    jobs = {build: emulator.pool.submit(emulator.compile, "canaries", build) for build in BUILDS}
    return {build: job.result() for build, job in jobs.items()}


@pytest.mark.parametrize(("canary", "build"), CANARIES)
def test_a_bug_is_seen(canary: str, build: str, canaries: dict[str, Path]) -> None:
    done = run(canaries[build], "bug", canary)
    assert done.returncode not in (0, 2)
    assert re.search(CANARIES[canary, build], done.stdout + done.stderr, re.DOTALL)


@pytest.mark.parametrize("build", BUILDS)
def test_the_same_kernels_without_their_bugs_are_clean(build: str, canaries: dict[str, Path]) -> None:
    done = run(canaries[build], "fixed")
    assert done.returncode == 0, (done.stdout + done.stderr)[:8000]
    assert done.stdout.split("\n") == [*(f"ran {canary}" for canary in dict.fromkeys(name for name, _ in CANARIES)), ""]
    assert not done.stderr


# Which driver runs the barriers of each file.
BARRIERS_OF = {
    "cuda/common.cuh": "steer_delta",
    "cuda/steer_delta.cuh": "steer_delta",
    "cuda/sae_decode.cuh": "sae_decode",
    "cuda/sae_encode.cuh": "sae_encode",
    "cuda/sae_splice.cuh": "sae_splice",
}


def assert_barriers_are_missed(emulator: Emulator, path: str, indices: list[int]) -> None:
    """Delete each barrier by itself: the driver must fail under TSan."""
    jobs = {i: emulator.submit(f"test_{BARRIERS_OF[path]}", "tsan", emulator.without_barrier(path, i)) for i in indices}
    done = {i: job.result() for i, job in jobs.items()}
    assert [i for i in indices if done[i].returncode == 0] == []
    assert all(re.search("data race|^FAILED|^simt:", one.stderr + one.stdout, re.MULTILINE) for one in done.values())


@pytest.mark.parametrize("path", ["cuda/steer_delta.cuh", "cuda/sae_decode.cuh"])
def test_a_missing_barrier_is_seen(path: str, emulator: Emulator) -> None:
    assert_barriers_are_missed(emulator, path, [0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", BARRIERS_OF)
def test_every_barrier_is_needed(path: str, emulator: Emulator) -> None:
    assert_barriers_are_missed(emulator, path, list(range(len(barriers(path)))))


def test_every_file_with_barriers_is_known() -> None:
    files = {f"cuda/{path.name}" for path in (CSRC / "cuda").glob("*.cuh")}
    assert {path for path in files if barriers(path)} == set(BARRIERS_OF)
