"""``steerserve lab overlap``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from steerserve.lab.commands.options import console, harvest_for, read_record, record
from steerserve.lab.evaluation.overlap import check_comparable, live_features, match_features, pair_correlations
from steerserve.lab.evaluation.report import OVERLAP_FIGURES, overlap_page, shown
from steerserve.sae.model import SAE
from steerserve.sae.registry import load_sae

REPORT = "overlap.html"


def overlap_command(
    sae_a: Annotated[Path, typer.Argument(help="SAE directory; the report is written into it.")],
    sae_b: Annotated[Path, typer.Argument(help="Another, such as the same training with another seed.")],
    activations: Annotated[
        Path | None, typer.Option(help="Harvest over which features are counted alive and matched ones correlated.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the harvest.")] = 200_000,
) -> None:
    """Match the features of two SAEs one to one: what share of them do both have?"""
    first, second = load_sae(sae_a), load_sae(sae_b)
    check_comparable(first, second)
    read_record(sae_a)  # refused before the work if it is damaged
    if activations is not None:
        for sae in (first, second):
            harvest_for(sae, activations)
    live = live_features(first, activations, tokens), live_features(second, activations, tokens)
    found = match_features(first, second, live)
    if activations is not None:
        correlation, num_tokens = pair_correlations(first, second, found.pairs, activations, tokens)
        found = replace(found, correlation=correlation, num_tokens=num_tokens)
    saes = [
        {"name": sae.name, "sha256": sae.sha256, "site": str(sae.site), "d_sae": sae.d_sae, "live": number}
        for sae, number in zip((first, second), found.live, strict=True)
    ]
    written = record(sae_a, "overlap", {**found.to_dict(), "saes": saes})
    (sae_a / REPORT).write_text(overlap_page(written))
    if (first.site, first.out_site) != (second.site, second.out_site):
        places = " and ".join(f"{sae.name} {_place(sae)}" for sae in (first, second))
        console.print(f"other sites, whose features are other things: {places}", style="yellow")
    table = Table("figure", "value")
    for name in OVERLAP_FIGURES:
        if name in written:
            table.add_row(name, shown(name, written[name]))
    console.print(table)
    console.print(f"report: {sae_a / REPORT}")


def _place(sae: SAE) -> str:
    return f"is at {sae.site}" if sae.transcodes_to is None else f"reads {sae.site} and writes {sae.out_site}"
