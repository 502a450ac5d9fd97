"""Do MLP neurons mean more things at once than SAE features? Two measures that need no labels, on the same texts.

A unit's *top contexts* are the 10 contexts in which it is most active, each at the position where it is most active.

* distinct tokens: the effective number of different tokens at those positions, exp(entropy): 1 if it is always the
  same token, 10 if never.
* coherence: the mean cosine of all pairs of them, each as the mean residual stream, standardised, over the active
  position and the 7 before: 1 if the passages are alike, 0 if they are as alike as any two. This is the monosemanticity
  score of Pach et al. (2025) on text, with the top contexts instead of activation weights.

A unit that means one thing shows few tokens, or coherent contexts, or both. The residual stream of another layer stands
in for meaning, half-way through the model; since the SAE's directions have a part in it, *random directions* at the
SAE's site show how much any direction would score, and *random positions* what chance gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.progress import track

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.bootstrap import Interval
from steerserve.lab.evaluation.splice import domain
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

TOP_CONTEXTS = 10
WINDOW = 8
BATCH_SIZE = 16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DOWN_PROJECTIONS = ("down_proj", "c_proj", "dense_4h_to_h")
"""The last linear map of an MLP, whose input are its neurons, in the supported families."""

FEATURES, NEURONS = "SAE features", "MLP neurons"

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """One measure of a population of units: the mean with its 95 % interval, and quantiles by their level."""

    mean: Interval
    quantiles: dict[str, float]


@dataclass(frozen=True)
class Population:
    """Both measures of one kind of unit; ``sampled`` units were drawn, of which ``measured`` have enough contexts."""

    name: str
    sampled: int
    measured: int
    distinct_tokens: Measure
    coherence: Measure


@dataclass(frozen=True)
class Polysemanticity:
    """All populations, and the difference of the means of features and neurons."""

    tokens: int
    mlp_layer: int
    reference_site: str
    populations: tuple[Population, ...]
    features_minus_neurons: dict[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "top_contexts": TOP_CONTEXTS, "window": WINDOW}


@dataclass(frozen=True, eq=False)
class Readings:
    """What one pass over ``n`` contexts leaves.

    Attributes:
        peaks: of every kind of unit, ``[n, units]``: the largest activation in each context (−inf: none), and where.
        passages: ``[n, T, d]`` standardised mean residual stream over the window that ends at each position.
    """

    peaks: dict[str, tuple[torch.Tensor, torch.Tensor]]
    passages: torch.Tensor


@torch.inference_mode()
def measure_polysemanticity(model: LoadedModel, sae: SAE, contexts: torch.Tensor, num_units: int) -> Polysemanticity:
    """Compare ``num_units`` sampled neurons of the MLP in the SAE's layer with as many sampled features.

    Args:
        contexts: ``[n, T]`` tokens.

    Raises:
        AssetError: fewer contexts than a measure needs, or fewer than two features fire in as many.
    """
    if len(contexts) < TOP_CONTEXTS:
        raise AssetError(f"polysemanticity needs {TOP_CONTEXTS} held-out contexts, and there are {len(contexts)}")
    reference = Site(model.n_layers // 2, Stream.RESID_POST)
    readings = _read(model, sae, contexts, num_units, reference)
    values = {name: _values(name, contexts, peaks, readings.passages) for name, peaks in readings.peaks.items()}
    return Polysemanticity(
        tokens=contexts.numel(),
        mlp_layer=sae.out_site.layer,
        reference_site=str(reference),
        populations=tuple(
            Population(name, peaks[0].shape[1], len(values[name][0]), *map(_measure, values[name]))
            for name, peaks in readings.peaks.items()
        ),
        features_minus_neurons={
            measure: _difference(*pair)
            for measure, pair in zip(
                ("distinct_tokens", "coherence"), zip(values[FEATURES], values[NEURONS], strict=True), strict=True
            )
        },
    )


def _read(model: LoadedModel, sae: SAE, contexts: torch.Tensor, num_units: int, reference: Site) -> Readings:
    generator = torch.Generator().manual_seed(0)
    features = torch.randperm(sae.d_sae, generator=generator)[:num_units]
    directions = torch.randn(sae.d_in, num_units, generator=generator)
    sites = tuple(dict.fromkeys((reference, sae.site, sae.out_site, Site(sae.out_site.layer, Stream.MLP_OUT))))
    peaks: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    passages, inside = [], []
    for tokens in track(contexts.split(BATCH_SIZE), "polysemanticity"):
        with mlp_neurons(model, sae.out_site.layer) as hidden:
            activations = activations_of(model, tokens, sites)
        x = activations[sae.site].float()
        rows = domain(sae, x, activations[sae.out_site]) & ordinary_rows(activations[reference])
        f = sae.encode(x)[..., features]
        neurons = hidden[0].float()[..., _sample(hidden[0].shape[-1], num_units)]
        populations = {
            FEATURES: f.masked_fill(f <= 0, -torch.inf),
            NEURONS: torch.cat([neurons, -neurons], dim=-1),
            "random directions": x @ directions,
            "random positions": torch.rand(*tokens.shape, num_units, generator=generator),
        }
        for name, values in populations.items():
            largest = values.masked_fill(~rows[..., None], -torch.inf).max(dim=1)
            peaks.setdefault(name, []).append((largest.values, largest.indices))
        passages.append(windows(activations[reference].float(), rows).half())
        inside.append(rows)
    joined = {name: (torch.cat([v for v, _ in of]), torch.cat([p for _, p in of])) for name, of in peaks.items()}
    joined[NEURONS] = stronger_sign(*joined[NEURONS])
    return Readings(joined, _standardised(torch.cat(passages), torch.cat(inside)))


@contextmanager
def mlp_neurons(model: LoadedModel, layer: int) -> Iterator[list[torch.Tensor]]:
    """Forward passes inside the block append the MLP's neurons ``[B, T, d_mlp]``, its last map's input, to a list."""
    mlp = model.adapter.layers(model.model)[layer].get_submodule(model.adapter.mlp)
    (last,) = [child for name, child in mlp.named_children() if name in DOWN_PROJECTIONS]
    neurons: list[torch.Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: neurons.append(args[0]))
    try:
        yield neurons
    finally:
        handle.remove()


def effective_number(tokens: torch.Tensor) -> torch.Tensor:
    """exp(entropy) ``[units]`` of the values in each row of ``tokens`` ``[units, n]``."""
    share = (tokens[:, :, None] == tokens[:, None, :]).double().mean(-1)
    return (-share.log().mean(-1)).exp()


def mean_pairwise_cosine(vectors: torch.Tensor) -> torch.Tensor:
    """``[units]`` over all pairs of the n vectors ``[units, n, d]`` of each."""
    n = vectors.shape[1]
    total = F.normalize(vectors.double(), dim=-1).sum(1).square().sum(-1)
    return (total - n) / (n * (n - 1))


def _sample(size: int, number: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:number]


def windows(residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean of ``residual`` ``[B, T, d]`` over those of the ``WINDOW`` positions up to each that are in ``rows``."""
    kept = F.pad(residual * rows[..., None], (0, 0, WINDOW, 0)).double().cumsum(1)
    number = F.pad(rows, (WINDOW, 0)).cumsum(1)
    total = kept[:, WINDOW:] - kept[:, :-WINDOW]
    return (total / (number[:, WINDOW:] - number[:, :-WINDOW]).clamp(min=1)[..., None]).float()


def _standardised(passages: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """``passages`` ``[n, T, d]``, each coordinate less its mean and by its standard deviation over ``inside``."""
    rows = passages[inside].float()
    std, mean = torch.std_mean(rows, dim=0)
    return ((passages.float() - mean) / std.clamp(min=1e-6)).half()


def stronger_sign(value: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of neurons and then their negatives, ``[n, 2 · units]``, whichever is larger at its largest."""
    half = value.shape[1] // 2
    negative = value[:, half:].amax(0) > value[:, :half].amax(0)
    chosen = torch.arange(half) + half * negative
    return value[:, chosen], position[:, chosen]


def _values(
    name: str, contexts: torch.Tensor, peaks: tuple[torch.Tensor, torch.Tensor], passages: torch.Tensor
) -> tuple[Values, Values]:
    """Distinct tokens and coherence of each unit that is active in enough contexts."""
    value, position = peaks
    enough = value.isfinite().sum(0) >= TOP_CONTEXTS
    if enough.sum() < 2:
        raise AssetError(
            f"of {len(enough)} sampled {name}, {enough.sum()} are active in {TOP_CONTEXTS} of the "
            f"{len(contexts)} held-out contexts; polysemanticity needs two, so more tokens"
        )
    top = value[:, enough].topk(TOP_CONTEXTS, dim=0).indices
    where = position[:, enough].gather(0, top)
    distinct = effective_number(contexts[top, where].T)
    coherence = mean_pairwise_cosine(passages[top, where].transpose(0, 1))
    return distinct.numpy(), coherence.numpy()


def _measure(values: Values) -> Measure:
    quantiles = {str(q): float(np.quantile(values, q)) for q in QUANTILES}
    return Measure(_interval((values,), lambda a, axis: a.mean(axis)), quantiles)


def _difference(first: Values, second: Values) -> Interval:
    return _interval((first, second), lambda a, b, axis: a.mean(axis) - b.mean(axis))


def _interval(samples: tuple[Values, ...], statistic: Callable[..., Any]) -> Interval:
    """95 % percentile bootstrap over units, of every sample by itself."""
    from scipy.stats import bootstrap

    found = bootstrap(samples, statistic, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return Interval(float(statistic(*samples, axis=0)), float(found.low), float(found.high))
