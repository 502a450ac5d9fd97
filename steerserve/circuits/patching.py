"""Activation patching: what one part of the model, taken from the other prompt of a pair, does to a metric.

* *denoising* runs the corrupted prompt and puts one activation of the clean run in: what is enough to bring the
  behaviour back. Recovery = (corrupted − patched) / (corrupted − clean).
* *noising* runs the clean prompt and puts one activation of the corrupted run in: what the behaviour cannot do
  without. Damage = (patched − clean) / (corrupted − clean).

Both are 0 where nothing happens and 1 where the patched run is as the other prompt's; the quotient is taken of means
over prompts. A head is patched at all positions. Of the other activations three kinds of position are patched, each
by itself: those whose tokens *changed*, those *between* the first of them and the end, and the *last* one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from rich.progress import track

from steerserve.circuits.forward import (
    BATCH_SIZE,
    activations,
    all_last_logits,
    head_outputs,
    heads_transformed,
    last_logits,
    num_heads,
)
from steerserve.circuits.metrics import Metric
from steerserve.circuits.prompts import PromptPairs
from steerserve.errors import InvalidRequestError
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.types import Site, Stream

MIN_DIFFERENCE = 1e-6


class Part(StrEnum):
    """Which activation of a layer is patched."""

    HEADS = "heads"
    RESID_PRE = "resid_pre"
    ATTN_OUT = "attn_out"
    MLP_OUT = "mlp_out"


class Direction(StrEnum):
    """Which run goes where."""

    DENOISING = "denoising"
    NOISING = "noising"


class Positions(StrEnum):
    """Kinds of position; every one from the first changed token on is of one kind."""

    CHANGED = "changed"
    BETWEEN = "between"
    LAST = "last"

    def of(self, pairs: PromptPairs) -> torch.Tensor:
        """Mask ``[N, T]``."""
        is_last = torch.arange(pairs.clean.shape[1]) == pairs.last[:, None]
        behind = (pairs.changed.cumsum(1) > 0) & pairs.real
        match self:
            case Positions.CHANGED:
                return pairs.changed
            case Positions.BETWEEN:
                return behind & ~pairs.changed & ~is_last
            case Positions.LAST:
                return is_last


@dataclass(frozen=True)
class Patching:
    """Effects of every patch.

    Attributes:
        metric, meaning: larger is worse.
        clean, corrupted: the metric of the unpatched runs.
        columns: heads by number, or kinds of position.
        effect: ``[layers][columns]`` recovery or damage.
    """

    model: str
    pairs: str
    num_pairs: int
    metric: str
    meaning: str
    part: Part
    direction: Direction
    clean: float
    corrupted: float
    columns: tuple[str, ...]
    effect: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@torch.no_grad()
def patch(
    model: LoadedModel,
    pairs: PromptPairs,
    metric: Metric,
    part: Part = Part.HEADS,
    direction: Direction = Direction.DENOISING,
) -> Patching:
    """Patch each layer's ``part``, one column at a time; a forward pass over all prompts each.

    Raises:
        InvalidRequestError: the metric does not tell the clean runs from the corrupted ones.
    """
    clean, corrupted = _unpatched(model, pairs, metric)
    start, end, source, target = corrupted, clean, pairs.clean, pairs.corrupted
    if direction is Direction.NOISING:
        start, end, source, target = end, start, target, source
    patches: _Patches = _HeadPatches(model, source)
    if part is not Part.HEADS:
        patches = _SitePatches(model, source, Stream(part), pairs)
    effect = []
    for layer in track(range(model.n_layers), f"patching {part}"):
        values = [_patched(model, patches, target, pairs.last, metric, layer, c) for c in range(len(patches.columns))]
        effect.append(tuple((value - start) / (end - start) for value in values))
    return Patching(
        model=model.name,
        pairs=pairs.name,
        num_pairs=len(pairs),
        metric=metric.name,
        meaning=metric.meaning,
        part=part,
        direction=direction,
        clean=clean,
        corrupted=corrupted,
        columns=patches.columns,
        effect=tuple(effect),
    )


def _unpatched(model: LoadedModel, pairs: PromptPairs, metric: Metric) -> tuple[float, float]:
    """The metric of the clean and of the corrupted run."""
    clean, corrupted = (
        metric(all_last_logits(model, tokens, pairs.last)).item() for tokens in (pairs.clean, pairs.corrupted)
    )
    if not abs(corrupted - clean) > MIN_DIFFERENCE:
        both = f"{clean:.3g} on clean and {corrupted:.3g} on corrupted prompts"
        raise InvalidRequestError(f"metric {metric.name}", both, "different values, between which a patch can lie")
    return clean, corrupted


def _patched(
    model: LoadedModel,
    patches: _Patches,
    target: torch.Tensor,
    last: torch.Tensor,
    metric: Metric,
    layer: int,
    column: int,
) -> float:
    """The metric of the target run with one patch."""
    logits = []
    for start in range(0, len(target), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        with patches.applied(layer, column, rows):
            logits.append(last_logits(model, target[rows], last[rows]))
    return metric(torch.cat(logits)).item()


class _Patches(Protocol):
    columns: tuple[str, ...]

    def applied(self, layer: int, column: int, rows: slice) -> AbstractContextManager[None]:
        """Forward passes inside the block, over the prompts ``rows``, have the source's activation there."""


class _HeadPatches:
    def __init__(self, model: LoadedModel, source: torch.Tensor) -> None:
        self._model = model
        self._z = head_outputs(model, source)
        self.columns = tuple(map(str, range(num_heads(model))))

    def applied(self, layer: int, column: int, rows: slice) -> AbstractContextManager[None]:
        def replace(z: torch.Tensor) -> torch.Tensor:
            z = z.clone()
            z[:, :, column] = self._z[layer][rows, :, column]
            return z

        return heads_transformed(self._model, {layer: replace})


class _SitePatches:
    def __init__(self, model: LoadedModel, source: torch.Tensor, stream: Stream, pairs: PromptPairs) -> None:
        self._model = model
        self._sites = [Site(layer, stream) for layer in range(model.n_layers)]
        self._x = activations(model, source, self._sites)
        self._masks = [kind.of(pairs)[..., None] for kind in Positions]
        self.columns = tuple(kind.value for kind in Positions)

    def applied(self, layer: int, column: int, rows: slice) -> AbstractContextManager[None]:
        site = self._sites[layer]
        mask, of_source = self._masks[column][rows], self._x[site][rows]
        return transformed(self._model, {site: lambda x: torch.where(mask, of_source, x)})
