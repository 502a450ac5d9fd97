"""``features.json``, and the page that shows it.

::

    format, version    "steerserve-features", 1
    sae, model         name and sha256, site, out_site, d_sae; name and fingerprint
    scan               positions (ordinary ones, over which all is counted), tokens, context_length
    tokens             texts; a token below is an index into this list
    features           one object for each feature that was looked at:
      id, density, max, mean        share of positions where it fires, its largest activation, its mean where it fires
      histogram                     from, counts: counts[i] activations lie in [2^((from+i)/4), 2^((from+i+1)/4))
      top, bottom                   [token, logit] of the direct path (see ``lens``)
      output_score                  see ``effects``
      zero, max_clamp               null, or what clamping to 0 and to ``max`` did (see ``effects``): positions, kl and
                                    top_token (means over positions), up and down: [token, mean change of probability]
      correlated, nearest           [id, correlation], [id, cosine of decoder rows]
      examples                      the strongest firings, then each quarter of a random sample by activation:
                                    from, to (quantiles; null for the strongest) and examples:
        tokens, activations         the window, an activation for each token
        peak                        index of the position that the example was taken for
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steerserve.lab import html
from steerserve.lab.features.effects import Effect
from steerserve.lab.features.lens import RankedTokens, token_texts
from steerserve.lab.features.neighbours import Neighbours
from steerserve.lab.features.scan import AFTER, BEFORE, LOWEST_BIN, Firings, Scan
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT, VERSION = "steerserve-features", 1
SHOWN_TOKENS, SHOWN_CHANGES, SHOWN_TOP, SHOWN_IN_BAND = 10, 5, 8, 3
BANDS = ((0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))


@dataclass(frozen=True, eq=False)
class Findings:
    """All that was measured of the features of ``scan``, in its order."""

    scan: Scan
    top: RankedTokens
    bottom: RankedTokens
    output_score: torch.Tensor
    correlated: Neighbours
    nearest: Neighbours
    effects: list[tuple[Effect, Effect]]


def features_json(model: LoadedModel, sae: SAE, findings: Findings) -> dict[str, Any]:
    """The content of ``features.json``."""
    table = _TokenTable()
    features = [_feature(findings, index, table) for index in range(len(findings.scan.features))]
    return {
        "format": FORMAT,
        "version": VERSION,
        "sae": {
            "name": sae.name,
            "sha256": sae.sha256,
            "site": str(sae.site),
            "out_site": str(sae.out_site),
            "d_sae": sae.d_sae,
        },
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "scan": {
            "positions": findings.scan.num_positions,
            "tokens": findings.scan.contexts.numel(),
            "context_length": findings.scan.contexts.shape[1],
        },
        "tokens": token_texts(model, table.ids),
        "features": features,
    }


def features_page(content: dict[str, Any]) -> str:
    """One self-contained page; it carries ``content`` compressed, and unpacks and draws it in the browser."""
    packed = gzip.compress(_dumps(content).encode(), compresslevel=6, mtime=0)
    return html.render(
        "features",
        content=content,
        num_dead=sum(feature["density"] == 0 for feature in content["features"]),
        packed=base64.b64encode(packed).decode(),
        overview=html.svg(_overview(content["features"])),
    )


def write(content: dict[str, Any], page: Path) -> None:
    """Write the page, and ``content`` into a ``.json`` file beside it."""
    page.with_suffix(".json").write_text(_dumps(content) + "\n", encoding="utf-8")
    page.write_text(features_page(content), encoding="utf-8")


def _dumps(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class _TokenTable:
    """Numbers token ids in the order they are first used."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}

    @property
    def ids(self) -> list[int]:
        return list(self._index)

    def __call__(self, token: int) -> int:
        return self._index.setdefault(token, len(self._index))


def _feature(findings: Findings, index: int, table: _TokenTable) -> dict[str, Any]:
    scan = findings.scan
    fired = int(scan.fired[index])
    zero, at_max = findings.effects[index]
    return {
        "id": int(scan.features[index]),
        "density": _rounded(fired / max(scan.num_positions, 1)),
        "max": _rounded(scan.largest[index].item()),
        "mean": _rounded(scan.total[index].item() / max(fired, 1)),
        "histogram": _histogram(scan.histogram[index]),
        "top": _ranked(findings.top, index, table),
        "bottom": _ranked(findings.bottom, index, table),
        "output_score": _rounded(findings.output_score[index].item()),
        "zero": _effect(zero, table),
        "max_clamp": _effect(at_max, table),
        "correlated": _neighbours(findings.correlated, index),
        "nearest": _neighbours(findings.nearest, index),
        "examples": list(_groups(scan, index, table)),
    }


def _histogram(counts: torch.Tensor) -> dict[str, Any]:
    filled = counts.nonzero()[:, 0].tolist()
    if not filled:
        return {"from": 0, "counts": []}
    return {"from": filled[0] + LOWEST_BIN, "counts": counts[filled[0] : filled[-1] + 1].tolist()}


def _ranked(ranked: RankedTokens, index: int, table: _TokenTable) -> list[list[float]]:
    ids, logits = ranked.ids[index, :SHOWN_TOKENS].tolist(), ranked.logits[index, :SHOWN_TOKENS].tolist()
    return [[table(token), _rounded(logit)] for token, logit in zip(ids, logits, strict=True)]


def _neighbours(neighbours: Neighbours, index: int) -> list[list[float]]:
    pairs = zip(neighbours.ids[index].tolist(), neighbours.likeness[index].tolist(), strict=True)
    return [[other, _rounded(likeness)] for other, likeness in pairs if likeness > 0]


def _effect(effect: Effect, table: _TokenTable) -> dict[str, Any] | None:
    count = len(effect.kl)
    if not count:
        return None
    ordered = effect.change.most_common()

    def means(changes: Sequence[tuple[int, float]]) -> list[list[float]]:
        return [[table(token), _rounded(change / count)] for token, change in changes[:SHOWN_CHANGES]]

    return {
        "positions": count,
        "kl": _rounded(sum(effect.kl) / count),
        "top_token": _rounded(sum(effect.top_token) / count),
        "up": means([each for each in ordered if each[1] > 0]),
        "down": means([each for each in reversed(ordered) if each[1] < 0]),
    }


def _groups(scan: Scan, index: int, table: _TokenTable) -> Iterator[dict[str, Any]]:
    """The strongest firings, then each quarter of the random sample, without empty groups and repeated windows."""
    seen: set[tuple[int, ...]] = set()
    count = int((scan.top.position[index] >= 0).sum())
    top = _examples(scan, scan.top, index, range(count), SHOWN_TOP, seen, table)
    if top:
        yield {"from": None, "to": None, "examples": top}
    sampled = int((scan.sample.position[index] >= 0).sum())
    by_value = scan.sample.value[index, :sampled].argsort(descending=True, stable=True)
    for low, high in BANDS:
        places = band(by_value, low, high).tolist()
        examples = _examples(scan, scan.sample, index, places, SHOWN_IN_BAND, seen, table)
        if examples:
            yield {"from": low, "to": high, "examples": examples}


def band(descending: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The entries of ``descending`` between two quantiles, of which 1 is the first entry."""
    count = len(descending)
    return descending[round((1 - high) * count) : round((1 - low) * count)]


def _examples(
    scan: Scan,
    firings: Firings,
    index: int,
    places: Sequence[int],
    limit: int,
    seen: set[tuple[int, ...]],
    table: _TokenTable,
) -> list[dict[str, Any]]:
    length = scan.contexts.shape[1]
    examples: list[dict[str, Any]] = []
    for place in places:
        context, at = divmod(int(firings.position[index, place]), length)
        start, stop = max(at - BEFORE, 0), min(at + AFTER + 1, length)
        tokens = scan.contexts[context, start:stop].tolist()
        if tuple(tokens) in seen:
            continue
        seen.add(tuple(tokens))
        window = firings.window[index, place, start - at + BEFORE : stop - at + BEFORE]
        activations = [_rounded(value) for value in window.tolist()]
        examples.append({"tokens": [table(token) for token in tokens], "activations": activations, "peak": at - start})
        if len(examples) == limit:
            break
    return examples


def _rounded(value: float) -> float:
    """Three significant digits, an integer where it is one."""
    short = float(f"{value:.3g}")
    return int(short) if short == int(short) else short


def _overview(features: list[dict[str, Any]]) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.9), layout="constrained")
    shown = {
        "log10 density": [np.log10(each["density"]) for each in features if each["density"]],
        "output score": [each["output_score"] for each in features],
        "log10 KL when clamped to 0 (nats)": [
            np.log10(each["zero"]["kl"]) for each in features if each["zero"] and each["zero"]["kl"]
        ],
    }
    for axes, (title, values) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        axes.hist(values, bins=40, color="#4c8dd6")
        axes.set_xlabel(title)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False, labelleft=False)
    return figure
