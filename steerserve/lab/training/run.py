"""A whole run in a directory: from its settings to a saved SAE, however often it is interrupted.

::

    checkpoint.safetensors   while it runs
    metrics.csv              what was measured on the way; training.svg is its picture
    cfg.json, sae_weights.safetensors   the SAE, once it is done
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerserve.errors import AssetError
from steerserve.lab.store import ActivationStore
from steerserve.lab.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from steerserve.lab.training.metrics import Metrics, MetricsLog, plot_metrics
from steerserve.lab.training.settings import TrainConfig
from steerserve.lab.training.trainer import Trainer
from steerserve.sae.formats.saelens import save_sae
from steerserve.sae.model import SAE


@dataclass(frozen=True)
class RunOptions:
    """What leaves the trained SAE as it is.

    Attributes:
        checkpoint_every: steps between checkpoints; an interruption loses less than that.
        log_every: steps between lines of metrics.
        tensorboard: whether to write TensorBoard events beside ``metrics.csv``.
    """

    checkpoint_every: int = 500
    log_every: int = 50
    tensorboard: bool = False


def run(
    store: ActivationStore,
    config: TrainConfig,
    directory: Path,
    options: RunOptions,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> SAE:
    """Train, or go on from the checkpoint in ``directory``, and save the SAE there, named after it.

    Raises:
        AssetError: a shard is damaged, a checkpoint is of another run, or something cannot be written.
        InvalidRequestError: the settings do not fit the store, or the loss became infinite.
    """
    settings = run_settings(store, config)
    checkpoint = load_checkpoint(directory, settings)
    trainer = Trainer(store, config)
    if checkpoint is not None:
        trainer.restore(*checkpoint)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with MetricsLog(directory, trainer.num_steps, options.tensorboard) as log:
            for metrics in _steps(trainer, directory, options, settings):
                log.write(metrics)
                report(metrics)
        sae = trainer.export(directory.absolute().name)
        save_sae(sae, directory)
        (directory / CHECKPOINT).unlink(missing_ok=True)
        plot_metrics(directory)
    except OSError as error:
        raise AssetError(f"{directory}: the run cannot be written: {error}") from error
    return sae


def run_settings(store: ActivationStore, config: TrainConfig) -> dict[str, Any]:
    """What a run follows from, beside torch's version and the number of threads."""
    return config.model_dump(mode="json") | {
        "site": str(store.site),
        "out_site": str(store.out_site),
        "model_fingerprint": store.manifest.model_fingerprint,
        "harvested_rows": store.manifest.num_rows,
        "held_out_rows": store.held_out_rows,
    }


def _steps(trainer: Trainer, directory: Path, options: RunOptions, settings: dict[str, Any]) -> Iterator[Metrics]:
    """Take all steps that are left, with checkpoints on the way."""
    started, num_timed = time.perf_counter(), 0
    while trainer.num_steps < trainer.config.steps:
        forward, loss = trainer.step()
        num_timed += 1
        is_last = trainer.num_steps == trainer.config.steps
        if trainer.num_steps % options.log_every == 0 or is_last:
            rate = num_timed * trainer.config.batch_size / (time.perf_counter() - started)
            yield Metrics(**asdict(trainer.stats(forward, loss)), rows_per_second=rate)
            started, num_timed = time.perf_counter(), 0
        if trainer.num_steps % options.checkpoint_every == 0 and not is_last:
            save_checkpoint(directory, trainer.state(), trainer.num_steps, settings)
