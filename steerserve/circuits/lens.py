"""The logit lens: what the model would answer if each layer were its last (nostalgebraist 2020).

The residual stream at the last position is put through the model's own final norm and unembedding. Early layers do
not write in the unembedding's basis, so what the lens does not show may still be there; see ``layer_probes``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from steerserve.circuits.forward import activations, unembedded
from steerserve.circuits.metrics import METRICS, kl
from steerserve.circuits.prompts import PromptPairs
from steerserve.models.loading import LoadedModel
from steerserve.types import Site, Stream

TOP_TOKENS = 5


@dataclass(frozen=True)
class LensReading:
    """What the lens reads at one site, over the clean prompts.

    Attributes:
        kl: KL(model ‖ lens) in nats, mean.
        value: the metric, larger is worse.
        p_correct, p_wrong: mean probability of either kind of answer.
        top: the tokens that are likeliest on average.
    """

    site: str
    kl: float
    value: float
    p_correct: float
    p_wrong: float
    top: tuple[str, ...]


@dataclass(frozen=True)
class Lens:
    """The readings from the embeddings to the output of the last layer."""

    model: str
    pairs: str
    num_pairs: int
    metric: str
    readings: tuple[LensReading, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@torch.no_grad()
def read_layers(model: LoadedModel, pairs: PromptPairs, metric: str) -> Lens:
    """The lens at the last position of the clean prompts; ``metric`` is a key of ``METRICS``."""
    sites = residual_sites(model)
    rows = torch.arange(len(pairs))
    x = activations(model, pairs.clean, sites)
    at_last = {site: x[site][rows, pairs.last] for site in sites}
    final = unembedded(model, at_last[sites[-1]])
    measure, divergence = METRICS[metric](pairs, final), kl(final)
    readings = []
    for site in sites:
        logits = unembedded(model, at_last[site])
        p = logits.float().softmax(-1)
        readings.append(
            LensReading(
                site=str(site),
                kl=divergence(logits).item(),
                value=measure(logits).item(),
                p_correct=_mean_probability(p, pairs.correct),
                p_wrong=_mean_probability(p, pairs.wrong),
                top=_texts(model, p.mean(0).topk(TOP_TOKENS).indices.tolist()),
            )
        )
    return Lens(model.name, pairs.name, len(pairs), metric, tuple(readings))


def residual_sites(model: LoadedModel) -> list[Site]:
    """The residual stream before the first layer and after each."""
    return [Site(0, Stream.RESID_PRE), *(Site(layer, Stream.RESID_POST) for layer in range(model.n_layers))]


def layer_labels(model: LoadedModel) -> list[str]:
    """Of each of ``residual_sites``, for an axis."""
    return ["emb", *map(str, range(model.n_layers))]


def _mean_probability(p: torch.Tensor, answers: tuple[tuple[int, ...], ...]) -> float:
    return sum(float(row[list(ids)].sum()) for row, ids in zip(p, answers, strict=True)) / len(answers)


def _texts(model: LoadedModel, ids: list[int]) -> tuple[str, ...]:
    decoded: Any = model.tokenizer.batch_decode([[token] for token in ids])
    return tuple(decoded)
