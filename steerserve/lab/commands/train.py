"""``steerserve lab train``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from steerserve.lab.commands.options import record
from steerserve.lab.store import ActivationStore
from steerserve.lab.training import TrainConfig, TrainStats, train_batch_topk
from steerserve.sae.saelens import save_sae
from steerserve.types import Site


def train_command(
    activations: Annotated[Path, typer.Option(help="Directory written by `lab harvest`.")],
    site: Annotated[str, typer.Option(help="Which of its sites.")],
    out: Annotated[Path, typer.Option(help="Directory for the SAE; its name becomes the SAE's.")],
    d_sae: Annotated[int, typer.Option(min=1, help="Number of features.")] = 4608,
    k: Annotated[int, typer.Option(min=1, help="Mean number of active features per token.")] = 48,
    steps: Annotated[int, typer.Option(min=1)] = 6000,
    seed: int = 0,
) -> None:
    """Train a BatchTopK SAE and save it in SAELens format."""
    config = TrainConfig(d_sae=d_sae, k=k, steps=steps, seed=seed)
    with Progress() as progress:
        task = progress.add_task("train", total=steps)

        def report(stats: TrainStats) -> None:
            text = f"train  FVU {stats.fvu:.3f}  dead {stats.dead_share:.1%}"
            progress.update(task, completed=stats.step, description=text)

        store = ActivationStore(activations, Site.parse(site), seed=seed)
        sae = train_batch_topk(store, config, out.name, report)
    save_sae(sae, out)
    record(out, "training", {**asdict(config), "harvested_tokens": store.manifest.num_tokens})
