"""Our trainer against SAELens', on the same stored activations with the same settings: rows per second, and quality.

Both train SAEs of one architecture on the same stream of batches (same order, same rows) with equal d_sae, k, batch
size, learning rate, warm-up, decay, averaging of the threshold, and precision (fp32 weights, bf16 autocast); what else
a trainer has is as its authors set it. They take turns of ``--turn`` steps: a round is one turn of each, and the ratio
of their rows per second is taken within it. Reading the batch counts for both; logging and checkpoints for neither.

Then both are saved, loaded, and measured on rows that neither saw, with the threshold that is in the file:

    L0, FVU        as they are
    FVU at k       with the threshold moved, on half of these rows, to where L0 is k, and measured on the other half

Activations are those of `steerserve lab harvest`. SAELens is not among our dependencies: `pip install -e '.[bench]'`.

    python bench/bench_training.py --activations DIR --site blocks.20.hook_resid_post [--quick] [--write]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from measure import Report, columns, interval, ratio, spread, take_turns
from sae_lens import BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

from steerserve.lab.store import ActivationStore
from steerserve.lab.training.held_out import HeldOutFigures, held_out_figures
from steerserve.lab.training.settings import TopKConfig, train_config
from steerserve.lab.training.trainer import Trainer
from steerserve.sae.formats.saelens import save_sae
from steerserve.sae.model import SAE
from steerserve.sae.registry import load_sae
from steerserve.types import Site

OURS, SAELENS = "steerserve", "SAELens"
PEERS = {"batchtopk": BatchTopKTrainingSAEConfig, "topk": TopKTrainingSAEConfig}
BATCHES_FOR_SCALE = 20
"""Over which SAELens estimates the scale of its input."""


class Arm(Protocol):
    """A trainer."""

    def step(self) -> object: ...
    def save(self, directory: Path) -> None: ...


class Ours(Trainer):
    def save(self, directory: Path) -> None:
        save_sae(self.export(OURS), directory)


class SAELensTrainer:
    """What ``SAETrainer.fit`` does, a step at a time."""

    def __init__(self, store: ActivationStore, config: TopKConfig) -> None:
        torch.manual_seed(config.seed)
        width = store.manifest.d_model
        sae_config = PEERS[config.architecture](
            d_in=width, d_sae=config.d_sae, k=config.k, normalize_activations="expected_average_only_in"
        )
        sae = TrainingSAE.get_sae_class_for_architecture(config.architecture)(sae_config)
        trainer_config = SAETrainerConfig(
            total_training_samples=config.steps * config.batch_size,
            train_batch_size_samples=config.batch_size,
            lr=config.learning_rate,
            lr_end=config.learning_rate / 10,
            lr_warm_up_steps=config.warmup_steps,
            lr_decay_steps=round(config.decay_fraction * config.steps),
            autocast=True,
            dead_feature_window=config.dead_after_rows // config.batch_size,
            logger=LoggingConfig(log_to_wandb=False),
        )
        batches = (x for x, _ in store.stream(config.batch_size, skip=1))
        self.trainer = SAETrainer(trainer_config, sae, batches)
        estimate = (x for x, _ in store.stream(config.batch_size))
        self.trainer.activation_scaler.estimate_scaling_factor(width, estimate, BATCHES_FOR_SCALE)

    def step(self) -> None:
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(next(self.trainer.data_provider))
        self.trainer.n_training_steps += 1

    def save(self, directory: Path) -> None:
        scale = self.trainer.activation_scaler.scaling_factor
        assert scale is not None
        self.trainer.sae.fold_activation_norm_scaling_factor(scale)
        self.trainer.sae.save_inference_model(str(directory))


@dataclass(frozen=True)
class Quality:
    as_saved: HeldOutFigures
    fvu_at_k: float


def timed(arm: Arm, config: TopKConfig, num_steps: int) -> Callable[[int], float]:
    """A turn: rows per second of so many steps."""

    def turn(number: int) -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            arm.step()
        return num_steps * config.batch_size / (time.perf_counter() - start)

    return turn


def train_both(store: ActivationStore, config: TopKConfig, turn: int) -> tuple[dict[str, list[float]], dict[str, SAE]]:
    """Rows per second of each turn, and the SAEs in the end."""
    arms: dict[str, Arm] = {OURS: Ours(store, config), SAELENS: SAELensTrainer(store, config)}
    turns = {name: timed(arm, config, turn) for name, arm in arms.items()}
    rates = take_turns(f"{config.architecture}, seed {config.seed}", turns, config.steps // turn - 1)
    saes = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, arm in arms.items():
            arm.save(Path(directory, name))
            saes[name] = load_sae(Path(directory, name), site=store.site)
    return rates, saes


def quality(sae: SAE, store: ActivationStore, k: int) -> Quality:
    x, _ = store.held_out()
    to_match, to_measure = x.tensor_split(2)
    if sae.is_thresholded:
        pre = replace(sae, threshold=torch.zeros_like(sae.threshold)).encode(to_match).flatten()
        threshold = pre.kthvalue(pre.numel() - k * len(to_match)).values
        sae_at_k = replace(sae, threshold=threshold.expand_as(sae.threshold))
    else:
        sae_at_k = sae
    return Quality(held_out_figures(sae, (x, x)), held_out_figures(sae_at_k, (to_measure, to_measure)).fvu)


def compare(options: argparse.Namespace, architecture: str, report: Report) -> None:
    rates: dict[str, list[float]] = {OURS: [], SAELENS: []}
    table = columns(
        f"{architecture}, {options.held_out_rows:,} held-out rows", "", "seed", "L0", "FVU", "FVU at k", "dead"
    )
    for seed in range(options.seeds):
        settings = {name: getattr(options, name) for name in ("d_sae", "k", "batch_size", "steps", "learning_rate")}
        settings |= {"seed": seed, "warmup_steps": max(options.steps // 10, 1)}
        if architecture == "batchtopk":
            settings["threshold_decay"] = 1 - PEERS[architecture].topk_threshold_lr
        config = train_config(architecture, settings)
        assert isinstance(config, TopKConfig)
        store = ActivationStore(options.activations, options.site, seed=seed, held_out_rows=options.held_out_rows)
        measured, saes = train_both(store, config, options.turn)
        for name, sae in saes.items():
            rates[name] += measured[name]
            found = quality(sae, store, config.k)
            as_saved = found.as_saved
            cells = f"{as_saved.l0:.2f}", f"{as_saved.fvu:.4f}", f"{found.fvu_at_k:.4f}", f"{as_saved.dead_share:.1%}"
            table.add_row(name, str(seed), *cells)
    size = f"d_sae {options.d_sae}, k {options.k}, batch {options.batch_size}, {options.steps} steps"
    speed = columns(f"{architecture}: {size}: median and range", "", "rows/s", "÷ SAELens, 95 % interval")
    for name, values in rates.items():
        speed.add_row(name, spread(values, ",.0f"), interval(ratio(values, rates[SAELENS])))
    report.print(speed, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=Path, required=True)
    parser.add_argument("--site", type=Site.parse, required=True)
    parser.add_argument("--architecture", nargs="+", choices=list(PEERS), default=["batchtopk"])
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out-rows", type=int, default=50_000)
    parser.add_argument("--turn", type=int, default=10, help="steps in a row of one trainer")
    parser.add_argument("--quick", action="store_true", help="60 steps of one small SAE: whether it runs, no figures")
    parser.add_argument("--write", action="store_true", help="keep the tables in bench/results")
    options = parser.parse_args()
    if options.quick:
        options.d_sae, options.k, options.batch_size, options.steps, options.seeds = 512, 16, 256, 60, 1
        options.held_out_rows = 2000
    report = Report()
    for architecture in options.architecture:
        compare(options, architecture, report)
    if options.write:
        report.save()


if __name__ == "__main__":
    main()
