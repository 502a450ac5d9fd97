"""Sparse probing: what can be read off a few features, beside what the raw activation tells.

Each text gives one vector: its features, or its activations, pooled over its ordinary positions. A *k-sparse probe* is
a logistic regression on the k coordinates that best separate the label on the train split by themselves (F statistic;
Gurnee et al. 2023, SAEBench 2025). The same is done with k coordinates of the raw activation, and with all of it: that
*dense probe* is what an SAE has to match. Regularisation is chosen on the validation split, figures are from the test
split. Labels are taken one against the rest.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.bootstrap import Interval
from steerserve.lab.corpus import Document, Split
from steerserve.lab.evaluation.splice import check_finite
from steerserve.lab.tokens import bos_of, padded
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE

Matrix = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

SPARSITIES = (1, 5, 20)
INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)
MIN_TEXTS = 5
"""Of a label, and of the rest, in each split."""
BATCH_SIZE = 32
Z_95 = 1.959964


@dataclass(frozen=True)
class Probe:
    """One probe on the test split.

    Attributes:
        basis: ``features`` or ``activation``.
        k: coordinates that it sees; None for all.
        auroc: with DeLong's 95 % interval.
        accuracy: share of test texts on the right side of probability 0.5.
        chosen: the k coordinates, best first; empty for all.
    """

    basis: str
    k: int | None
    auroc: Interval
    accuracy: float
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class ProbeTask:
    """All probes of one label against the rest; ``positives`` and ``texts`` are counts by split."""

    label: str
    positives: dict[str, int]
    texts: dict[str, int]
    probes: tuple[Probe, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class PooledTexts:
    """One row a text: ``[n, d_sae]``, ``[n, d_in]`` and their labels."""

    features: Matrix
    activation: Matrix
    labels: npt.NDArray[np.str_]


def probe_labels(
    model: LoadedModel, sae: SAE, documents: Mapping[Split, Sequence[Document]], context_length: int, pooling: str
) -> list[ProbeTask]:
    """Probe every label that has enough texts; of two labels, the rarer.

    Args:
        documents: labelled texts of all three splits; of each, the first ``context_length`` tokens are read.
        pooling: ``mean`` or ``max``.

    Raises:
        AssetError: no label has enough texts, or an activation is not finite.
    """
    labels_to_probe({split: [document.label for document in of] for split, of in documents.items()})
    pooled = {split: pool(model, sae, of, context_length, pooling) for split, of in documents.items()}
    labels = labels_to_probe({split: of.labels.tolist() for split, of in pooled.items()})
    return [_probe_label(label, pooled) for label in track(labels, "probes")]


def labels_to_probe(labels: Mapping[Split, Sequence[str]]) -> list[str]:
    """Labels with ``MIN_TEXTS`` texts with and without them in each split; of two labels, the rarer.

    Raises:
        AssetError: there is none.
    """
    counts = {split: Counter(of) for split, of in labels.items()}
    total = sum(counts.values(), Counter[str]())
    usable = [
        label
        for label in sorted(total)
        if all(min(of[label], of.total() - of[label]) >= MIN_TEXTS for of in counts.values())
    ]
    if not usable:
        found = "; ".join(f"{split}: {dict(of) or 'no texts'}" for split, of in counts.items())
        raise AssetError(
            f"probing needs a label with at least {MIN_TEXTS} texts, and as many of other labels, "
            f"in each split; texts by label are {found}"
        )
    return [min(usable, key=lambda label: total[label])] if len(total) == 2 else usable


@torch.inference_mode()
def pool(model: LoadedModel, sae: SAE, documents: Sequence[Document], context_length: int, pooling: str) -> PooledTexts:
    """Features and activations of each text, ``mean`` or ``max`` over its ordinary positions.

    A text stands behind a BOS token if the tokenizer adds one, else behind an end-of-sequence token, as in a harvest.
    One without an ordinary position is left out.
    """
    head = bos_of(model) or [model.tokenizer.eos_token_id]
    encoded = [
        ([*head, *model.tokenizer(each.text, add_special_tokens=False).input_ids][:context_length], each.label)
        for each in documents
    ]
    encoded.sort(key=lambda each: len(each[0]))  # batches of equal lengths need little padding
    features, activation = torch.empty(len(encoded), sae.d_sae), torch.empty(len(encoded), sae.d_in)
    read = torch.zeros(len(encoded), dtype=torch.bool)
    for start in track(range(0, len(encoded), BATCH_SIZE), "labelled texts"):
        batch = [ids for ids, _ in encoded[start : start + BATCH_SIZE]]
        tokens, real = padded(batch)
        x = activations_of(model, tokens, (sae.site,))[sae.site]
        check_finite(x, sae.site)
        for number, (rows, keep) in enumerate(zip(x, ordinary_rows(x, real), strict=True), start):
            if keep.any():
                kept = rows[keep].float()
                features[number], activation[number] = _pooled(sae.encode(kept), pooling), _pooled(kept, pooling)
                read[number] = True
    labels = np.array([label for _, label in encoded], dtype=np.str_)
    return PooledTexts(features[read].numpy(), activation[read].numpy(), labels[read.numpy()])


def auroc_interval(positive: npt.NDArray[np.float64], negative: npt.NDArray[np.float64]) -> Interval:
    """Area under the ROC curve of scores, with the 95 % interval of DeLong et al. (1988); at least two of each."""
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    area = wins.mean()
    variance = wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)
    half = Z_95 * np.sqrt(variance)
    return Interval(float(area), float(max(area - half, 0)), float(min(area + half, 1)))


def _pooled(rows: torch.Tensor, pooling: str) -> torch.Tensor:
    return rows.mean(0) if pooling == "mean" else rows.amax(0)


def _probe_label(label: str, pooled: Mapping[Split, PooledTexts]) -> ProbeTask:
    y = {split: texts.labels == label for split, texts in pooled.items()}
    width = min(pooled[Split.TRAIN].features.shape[1], pooled[Split.TRAIN].activation.shape[1])
    sparsities = [k for k in SPARSITIES if k < width]
    probes = []
    for basis in ("features", "activation"):
        x = {split: getattr(texts, basis) for split, texts in pooled.items()}
        ranking = separation(x[Split.TRAIN], y[Split.TRAIN]).argsort()[::-1]
        for k in (*sparsities, None):
            columns = ranking[:k]
            auroc, accuracy = _fit_and_test({split: of[:, columns] for split, of in x.items()}, y)
            probes.append(Probe(basis, k, auroc, accuracy, tuple(columns.tolist()) if k else ()))
    return ProbeTask(
        label,
        positives={split.value: int(of.sum()) for split, of in y.items()},
        texts={split.value: len(of) for split, of in y.items()},
        probes=tuple(probes),
    )


def separation(x: Matrix, y: Mask) -> npt.NDArray[np.float64]:
    """F statistic of each column; 0 where it does not vary."""
    from sklearn.feature_selection import f_classif

    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore")  # that a column is constant
        scores: npt.NDArray[np.float64] = f_classif(x.astype(np.float64), y)[0]
    return np.nan_to_num(scores, nan=0.0)


def _fit_and_test(x: Mapping[Split, Matrix], y: Mapping[Split, Mask]) -> tuple[Interval, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=1000)).fit(
            x[Split.TRAIN], y[Split.TRAIN]
        )
        for inverse_penalty in INVERSE_PENALTIES
    ]
    best = min(fitted, key=lambda model: log_loss(y[Split.VALIDATION], model.predict_proba(x[Split.VALIDATION])))
    scores, truth = best.decision_function(x[Split.TEST]), y[Split.TEST]
    return auroc_interval(scores[truth], scores[~truth]), float(((scores > 0) == truth).mean())
