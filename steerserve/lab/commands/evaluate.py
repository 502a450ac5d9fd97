"""``steerserve lab eval``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from steerserve.errors import AssetError
from steerserve.lab.commands.options import ModelOption, TextsOption, console, harvest_for, read_record, record, sae_for
from steerserve.lab.corpus import Split, read_documents
from steerserve.lab.evaluation.features import feature_stats, save_density
from steerserve.lab.evaluation.fidelity import held_out_contexts, measure_fidelity
from steerserve.lab.evaluation.polysemanticity import measure_polysemanticity
from steerserve.lab.evaluation.probing import probe_labels
from steerserve.lab.evaluation.report import FIGURES, evaluation_page, interval, shown
from steerserve.lab.evaluation.splice import kernel_computes
from steerserve.models.loading import LoadedModel, load_model
from steerserve.models.pull import resolve_model
from steerserve.sae.formats.saelens import save_max_activation
from steerserve.sae.model import SAE

REPORT = "evaluation.html"


class Pooling(StrEnum):
    """How the positions of a text become one vector."""

    MEAN = "mean"
    MAX = "max"


def eval_command(
    sae: Annotated[Path, typer.Argument(help="SAE directory; the report is written into it.")],
    texts: TextsOption,
    activations: Annotated[Path, typer.Option(help="Harvest over which density and dead features are counted.")],
    model: ModelOption = "smollm2-135m-instruct",
    held_out_tokens: Annotated[int, typer.Option(min=128)] = 100_000,
    density_tokens: Annotated[int, typer.Option(min=1)] = 1_000_000,
    labelled: Annotated[
        Path | None, typer.Option(help="Texts with a 'label' field: what sparse probes read from features.")
    ] = None,
    probe_texts: Annotated[int, typer.Option(min=1, help="Most labelled texts of each split.")] = 4000,
    pooling: Annotated[Pooling, typer.Option(help="Over a text's positions, for probes.")] = Pooling.MEAN,
    neurons: Annotated[
        int, typer.Option(min=0, help="MLP neurons, and features, whose polysemanticity is compared; 0: none.")
    ] = 256,
) -> None:
    """Measure an SAE on held-out texts: fidelity, density, and what probes and polysemanticity say of its features."""
    loaded = load_model(resolve_model(model), torch.float32)
    trained = sae_for(loaded, sae)
    read_record(sae)  # refused before the work if it is damaged
    context_length = harvest_for(trained, activations, loaded).context_length
    stats = feature_stats(trained, activations, density_tokens)
    held_out = [document.text for document in read_documents(texts, Split.TEST)]
    contexts = held_out_contexts(loaded, held_out, context_length, held_out_tokens)
    figures = {**measure_fidelity(loaded, trained, contexts).to_dict(), **stats.to_dict()}
    if labelled is not None:
        documents = {split: read_documents([labelled], split)[:probe_texts] for split in Split}
        tasks = probe_labels(loaded, trained, documents, context_length, pooling)
        figures["probing"] = {
            "file": labelled.name,
            "pooling": pooling.value,
            "tasks": [task.to_dict() for task in tasks],
        }
    if neurons:
        try:
            figures["polysemanticity"] = measure_polysemanticity(loaded, trained, contexts, neurons).to_dict()
        except AssetError as reason:
            console.print(f"polysemanticity left out: {reason}", style="yellow")
    figures |= {"context_length": context_length, **_provenance(loaded, trained)}
    save_max_activation(stats.max_activation, trained, sae)
    save_density(stats, sae)
    written = record(sae, "evaluation", figures)  # what is in the file: page and file cannot disagree
    (sae / REPORT).write_text(evaluation_page(written))
    _print(written)
    console.print(f"report: {sae / REPORT}")


def _provenance(model: LoadedModel, sae: SAE) -> dict[str, Any]:
    return {
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "sae": {
            "name": sae.name,
            "sha256": sae.sha256,
            "site": str(sae.site),
            "out_site": str(sae.out_site),
            "d_sae": sae.d_sae,
            "k": sae.k,
            "by_kernel": kernel_computes(sae),
        },
    }


def _print(figures: dict[str, Any]) -> None:
    table = Table("figure", "value")
    for name in FIGURES:
        table.add_row(name, shown(name, figures[name]))
    console.print(table)
    if "probing" in figures:
        table = Table("label", "probe on", "k", "AUROC, 95 %", "accuracy")
        for task in figures["probing"]["tasks"]:
            for probe in task["probes"]:
                cells = (probe["basis"], str(probe["k"] or "all"), interval(probe["auroc"]), f"{probe['accuracy']:.1%}")
                table.add_row(task["label"], *cells)
        console.print(table)
    if "polysemanticity" in figures:
        table = Table("units", "measured", "distinct tokens, 95 %", "coherence, 95 %")
        for units in figures["polysemanticity"]["populations"]:
            measures = (interval(units["distinct_tokens"]["mean"], 2), interval(units["coherence"]["mean"]))
            table.add_row(units["name"], str(units["measured"]), *measures)
        console.print(table)
