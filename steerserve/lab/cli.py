"""``steerserve lab``: from text to a trained SAE and a measured concept pack."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from steerserve.lab.activations import ActivationStore, HarvestConfig, Manifest, harvest
from steerserve.lab.concepts import ConceptConfig, make_concept, measure_concept
from steerserve.lab.corpus import Split, read_documents
from steerserve.lab.evaluation import evaluate_sae, feature_stats
from steerserve.lab.training import TrainConfig, TrainStats, train_batch_topk
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import resolve_model
from steerserve.sae.model import SAE
from steerserve.sae.saelens import save_max_activation, save_sae
from steerserve.steering.catalog import Catalog
from steerserve.types import Site

app = typer.Typer(help="Collect activations, train and evaluate SAEs, build concept packs.", no_args_is_help=True)
console = Console()

ModelOption = Annotated[str, typer.Option(help="Name of a pullable model, a hub id, or a directory.")]
TextsOption = Annotated[
    list[Path], typer.Option(help=".jsonl[.gz] with a 'text' field, or .txt with a text per line; repeatable.")
]


@app.command("harvest")
def harvest_command(
    texts: TextsOption,
    site: Annotated[list[str], typer.Option(help="Site to keep, e.g. blocks.20.hook_resid_post; repeatable.")],
    out: Annotated[Path, typer.Option(help="Directory for the activations; a repeated run continues there.")],
    model: ModelOption = "smollm2-135m-instruct",
    context_length: Annotated[int, typer.Option(min=2)] = 128,
    max_tokens: Annotated[int, typer.Option(min=0, help="0: all texts.")] = 0,
) -> None:
    """Run the training split of TEXTS through the model and keep the activations of SITE."""
    loaded = load_model(resolve_model(model), torch.bfloat16)
    documents = read_documents(texts, Split.TRAIN)
    config = HarvestConfig(tuple(Site.parse(name) for name in site), context_length, max_tokens=max_tokens)
    manifest = harvest(loaded, [document.text for document in documents], out, config)
    console.print(f"{manifest.num_tokens:,} tokens, {manifest.num_rows:,} rows kept in {len(manifest.shards)} shards")


@app.command("train")
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
    _record(out, "training", {**asdict(config), "harvested_tokens": store.manifest.num_tokens})


@app.command("eval")
def eval_command(
    sae: Annotated[Path, typer.Argument(help="SAE directory in SAELens format.")],
    texts: TextsOption,
    activations: Annotated[Path, typer.Option(help="Harvest over which density and dead features are counted.")],
    model: ModelOption = "smollm2-135m-instruct",
    held_out_tokens: Annotated[int, typer.Option(min=128)] = 100_000,
    density_tokens: Annotated[int, typer.Option(min=1)] = 1_000_000,
) -> None:
    """Measure L0, FVU, ΔCE, CE recovered and the share of dead features on held-out texts."""
    loaded = load_model(resolve_model(model), torch.float32)
    trained = _sae_for(loaded, sae)
    stats = feature_stats(trained, activations, density_tokens)
    held_out = [document.text for document in read_documents(texts, Split.TEST)]
    context_length = Manifest.load(activations).context_length
    figures = evaluate_sae(loaded, trained, held_out, stats, context_length, held_out_tokens).to_dict()
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    save_max_activation(stats.max_activation, sae)
    _record(sae, "evaluation", figures)


@app.command("concept")
def concept_command(
    name: Annotated[str, typer.Argument(help="Name of the pack.")],
    sae: Annotated[Path, typer.Option(help="SAE directory.")],
    harmful: Annotated[list[Path], typer.Option(help="Texts of which many hold profanity; repeatable.")],
    benign: Annotated[list[Path], typer.Option(help="Texts of any other kind; repeatable.")],
    out: Annotated[Path, typer.Option(help="Directory for the pack.")],
    model: ModelOption = "smollm2-135m-instruct",
) -> None:
    """Build a profanity pack: features chosen by effect, clamps fitted and calibrated. Next: `lab card`."""
    loaded = load_model(resolve_model(model), torch.bfloat16)
    make_concept(loaded, _sae_for(loaded, sae), name, harmful, benign, ConceptConfig(), out, console)


@app.command("card")
def card_command(
    pack: Annotated[Path, typer.Argument(help="Pack directory; its card.json is rewritten.")],
    harmful: Annotated[list[Path], typer.Option(help="As for `lab concept`; the test split is used.")],
    benign: Annotated[list[Path], typer.Option(help="As for `lab concept`.")],
    model: ModelOption = "smollm2-135m-instruct",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, chosen before the seeds are drawn.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Continuations per prompt.")] = 5,
) -> None:
    """Measure a pack on held-out texts, guarded against unguarded, and write the figures into its card."""
    loaded = load_model(resolve_model(model), torch.bfloat16)
    measured = measure_concept(loaded, pack, harmful, benign, prompts, seeds)
    console.print_json(data=measured.card.evaluation)


def _sae_for(model: LoadedModel, directory: Path) -> SAE:
    """The SAE in ``directory``; refused as the server would refuse it, if it was trained on another model."""
    (sae,) = Catalog.load(model, saes=[str(directory.absolute())]).saes.values()
    return sae


def _record(sae: Path, key: str, figures: dict[str, Any]) -> None:
    """Put figures, and the command that made them, into the SAE's ``evaluation.json``."""
    path = sae / "evaluation.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record[key] = {**figures, "command": shlex.join(["steerserve", *sys.argv[1:]])}
    path.write_text(json.dumps(record, indent=1) + "\n")
