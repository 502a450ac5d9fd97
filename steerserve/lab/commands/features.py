"""``steerserve lab features``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import ModelOption, console, harvest_for, require_writable, sae_for
from steerserve.lab.corpus import Split, read_documents
from steerserve.models.loading import load_model
from steerserve.models.pull import resolve_model

NUM_NEIGHBOURS = 5


def features_command(
    sae: Annotated[Path, typer.Argument(help="SAE directory.")],
    texts: Annotated[
        list[Path] | None, typer.Option(help="Texts to look for examples in, as for `lab harvest`; repeatable.")
    ] = None,
    activations: Annotated[Path | None, typer.Option(help="A harvest of the SAE's site, instead of texts.")] = None,
    features: Annotated[str, typer.Option(help="Numbers such as 1,5,20, or all.")] = "all",
    out: Annotated[Path, typer.Option(help="The page; the same content goes into a .json beside it.")] = Path(
        "features.html"
    ),
    model: ModelOption = "smollm2-135m-instruct",
    max_tokens: Annotated[int, typer.Option(min=2)] = 500_000,
    context_length: Annotated[int, typer.Option(min=2, help="For texts; a harvest has its own.")] = 128,
) -> None:
    """Examples, logit lens, neighbours and measured effects of an SAE's features, as one page and as JSON."""
    from steerserve.lab.features import report
    from steerserve.lab.features.effects import LENS_TOKENS, clamping_effects, output_scores
    from steerserve.lab.features.lens import LogitLens
    from steerserve.lab.features.neighbours import correlated, nearest
    from steerserve.lab.features.scan import scan
    from steerserve.lab.features.source import HarvestSource, Source, TextSource

    if (texts is None) == (activations is None):
        raise InvalidRequestError("--texts", texts, "either --texts or --activations")
    for path in (out, out.with_suffix(".json")):
        require_writable("--out", path)
    loaded = load_model(resolve_model(model), torch.float32)
    trained = sae_for(loaded, sae)
    ids = parse_features(features, trained.d_sae)
    source: Source
    if activations is not None:
        harvest_for(trained, activations, loaded)
        source = HarvestSource(activations, trained.site, max_tokens)
    else:
        documents = read_documents(texts or [], Split.TRAIN)
        source = TextSource(loaded, trained.site, [each.text for each in documents], context_length, max_tokens)
    seen = scan(trained, source, ids)
    top, bottom = LogitLens(loaded).extremes(trained.W_dec[ids], LENS_TOKENS)
    findings = report.Findings(
        scan=seen,
        top=top,
        bottom=bottom,
        output_score=output_scores(loaded, trained, ids, top),
        correlated=correlated(seen.activations, ids, NUM_NEIGHBOURS),
        nearest=nearest(trained.W_dec, ids, NUM_NEIGHBOURS),
        effects=clamping_effects(loaded, trained, seen),
    )
    content = report.features_json(loaded, trained, findings)
    report.write(content, out)
    console.print(f"{len(ids):,} features over {seen.num_positions:,} positions: {out}, {out.with_suffix('.json')}")


def parse_features(text: str, d_sae: int) -> torch.Tensor:
    """Ids ``[F]``, ascending and each once, from ``all`` or numbers with commas between.

    Raises:
        InvalidRequestError: something else, or a number that the SAE does not have.
    """
    if text == "all":
        return torch.arange(d_sae)
    try:
        ids = sorted({int(part) for part in text.split(",")})
    except ValueError:
        ids = [-1]
    if ids[0] < 0 or ids[-1] >= d_sae:
        raise InvalidRequestError("--features", text, f"'all', or numbers from 0 to {d_sae - 1} with commas between")
    return torch.tensor(ids)
