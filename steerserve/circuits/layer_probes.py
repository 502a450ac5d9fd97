"""Linear probes by layer: from where on can a label be read off the residual stream?

At every site a logistic regression on standardised activations is judged by cross-validation, in which all examples
of a group (the two prompts of a pair) fall into one fold. The same with labels that are shuffled says what comes of
chance. A probe shows that something can be read, not that the model reads it; see ``patching``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from steerserve.circuits.forward import activations
from steerserve.circuits.lens import residual_sites
from steerserve.circuits.prompts import PromptPairs
from steerserve.errors import InvalidRequestError
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

FOLDS = 5
INVERSE_PENALTY = 0.1


@dataclass(frozen=True, eq=False)
class Examples:
    """What is probed.

    Attributes:
        rows: at each site one activation an example, ``[n, d]``.
        labels, groups: of each example.
    """

    name: str
    rows: Mapping[Site, torch.Tensor]
    labels: Sequence[str]
    groups: Sequence[int]


@dataclass(frozen=True)
class LayerProbe:
    """Balanced accuracy at one site, mean over the folds, its standard deviation, and with shuffled labels."""

    site: str
    accuracy: float
    deviation: float
    shuffled: float


@dataclass(frozen=True)
class LayerProbes:
    """A probe for every site; ``chance`` is 1 / number of labels."""

    model: str
    examples: str
    num_examples: int
    labels: tuple[str, ...]
    chance: float
    probes: tuple[LayerProbe, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def examples_of_pairs(model: LoadedModel, pairs: PromptPairs) -> Examples:
    """The last position of clean and corrupted prompts: has what distinguishes them arrived there?"""
    at = torch.arange(len(pairs)), pairs.last
    clean, corrupted = (
        {site: x[at] for site, x in activations(model, tokens, residual_sites(model)).items()}
        for tokens in (pairs.clean, pairs.corrupted)
    )
    rows = {site: torch.cat([clean[site], corrupted[site]]) for site in clean}
    labels = ["clean"] * len(pairs) + ["corrupted"] * len(pairs)
    return Examples(pairs.name, rows, labels, [*range(len(pairs))] * 2)


def examples_of_texts(
    model: LoadedModel, name: str, texts: Sequence[str], labels: Sequence[str], max_tokens: int
) -> Examples:
    """The mean over the positions of each text, cut at ``max_tokens``, without the first: that is an attention sink.

    Texts of a single token are left out.
    """
    encoded = [torch.tensor(ids[:max_tokens]) for ids in model.tokenizer(list(texts)).input_ids]
    kept = [i for i, ids in enumerate(encoded) if len(ids) > 1]
    rows: dict[Site, list[torch.Tensor]] = {site: [] for site in residual_sites(model)}
    for i in track(kept, "texts"):
        for site, x in activations(model, encoded[i][None], list(rows)).items():
            rows[site].append(x[0, 1:].mean(0))
    stacked = {site: torch.stack(of) for site, of in rows.items()}
    return Examples(name, stacked, [labels[i] for i in kept], list(range(len(kept))))


def probe_layers(model: LoadedModel, examples: Examples) -> LayerProbes:
    """Probe every site; deterministic.

    Raises:
        InvalidRequestError: fewer than two labels, or one with fewer groups than folds.
    """
    y, groups = np.array(examples.labels), np.array(examples.groups)
    names = np.unique(y)
    members = {str(name): len(np.unique(groups[y == name])) for name in names}
    if len(names) < 2 or min(members.values()) < FOLDS:
        raise InvalidRequestError("labels", members, f"at least two labels, with {FOLDS} examples each")
    shuffled = np.random.default_rng(0).permutation(y)
    probes = []
    for site, rows in track(examples.rows.items(), "probes"):
        x = rows.double().numpy()
        scores = _scores(x, y, groups)
        by_chance = _scores(x, shuffled, groups).mean()
        probes.append(LayerProbe(str(site), float(scores.mean()), float(scores.std(ddof=1)), float(by_chance)))
    return LayerProbes(model.name, examples.name, len(y), tuple(map(str, names)), 1 / len(names), tuple(probes))


def _scores(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.str_], groups: npt.NDArray[np.int_]
) -> npt.NDArray[np.float64]:
    """Balanced accuracy of each fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=1000))
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
    scores: npt.NDArray[np.float64] = cross_val_score(probe, x, y, groups=groups, cv=folds, scoring="balanced_accuracy")
    return scores
