"""One linear probe on all values of a reading, fitted as the detectors of concept packs are; see ``trial``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from steerserve.circuits.monitoring.choice import Head
from steerserve.circuits.monitoring.examples import Examples
from steerserve.circuits.monitoring.reads import Reads
from steerserve.lab.pooled_probe import TokenRows, fit_pooled
from steerserve.sae.formats.whole import written_whole
from steerserve.types import Site, Stream

FALSE_POSITIVE_RATE = 0.01

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """What one probe reads: heads, or whole sites.

    Attributes:
        components: reduce to so many principal components; 0: as it is.
    """

    heads: tuple[Head, ...] = ()
    sites: tuple[Site, ...] = ()
    components: int = 0

    @property
    def num_sites(self) -> int:
        return len({head.layer for head in self.heads}) + len(self.sites)


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted reading.

    Attributes:
        weight: ``[width]`` in units of the raw values; ``bias`` with it.
        scores: ``[texts]`` NaN for texts without a position.
        threshold: exceeded by 1 % of the negative texts that are for the threshold.
    """

    reading: Reading
    weight: Floats
    bias: float
    scores: Floats
    threshold: float


@dataclass(frozen=True, eq=False)
class Fitting:
    """Fits readings to the examples of one question.

    Attributes:
        kept: directory of what was fitted, so that a comparison that was stopped goes on; None: nothing is kept.
    """

    reads: Reads
    examples: Examples
    d_head: int
    kept: Path | None = None

    def fit(self, reading: Reading) -> Probe:
        """The probe of a reading, fitted, or as it was kept."""
        if self.kept is None:
            return fit_reading(self.reads, reading, self.examples, self.d_head)
        path = self.kept / f"probe-{self._key(reading)}.npz"
        if not path.exists():
            probe = fit_reading(self.reads, reading, self.examples, self.d_head)
            values = {"weight": probe.weight, "scores": probe.scores, "others": [probe.bias, probe.threshold]}
            with written_whole(path) as partial, partial.open("wb") as file:
                np.savez(file, **values)  # type: ignore[arg-type]
        with np.load(path) as saved:
            return Probe(
                reading, saved["weight"], float(saved["others"][0]), saved["scores"], float(saved["others"][1])
            )

    def _key(self, reading: Reading) -> str:
        """Of what the probe depends on, besides the activations that lie in the same directory."""
        examples = self.examples
        digest = hashlib.sha256(repr((reading, self.d_head)).encode())
        for column in (examples.positions, examples.label, examples.fit, examples.tune):
            digest.update(column.tobytes())
        return digest.hexdigest()[:16]


def given_probe(reads: Reads, site: Site, weight: npt.NDArray[np.float32], bias: float, examples: Examples) -> Probe:
    """A probe of one site that was fitted elsewhere."""
    x = torch.from_numpy(reads.values[site][examples.positions].astype(np.float32))
    return _probe(
        Reading(sites=(site,)), examples, x @ torch.from_numpy(weight) + bias, weight.astype(np.float64), bias
    )


def fit_reading(reads: Reads, reading: Reading, examples: Examples, d_head: int) -> Probe:
    """The probe of a reading, and every text's score."""
    x = torch.from_numpy(_values(reads, reading, examples.positions, d_head))
    in_fit = torch.from_numpy(examples.fit[examples.text])
    mean = x[in_fit].mean(0)
    basis = _components(x[in_fit] - mean, reading.components) if reading.components else None
    y = x - mean if basis is None else (x - mean) @ basis
    deviation = y[in_fit].std(0).clamp(min=1e-6)
    y /= deviation
    number = np.cumsum(examples.fit) - 1
    rows = TokenRows(
        {},
        torch.from_numpy(number[examples.text[in_fit.numpy()]]),
        torch.from_numpy(examples.label[examples.fit]).float(),
    )
    w, b = fit_pooled(y[in_fit], rows)
    weight = w / deviation if basis is None else basis @ (w / deviation)
    return _probe(reading, examples, y @ w + b, weight.double().numpy(), float(b - mean @ weight))


def _probe(reading: Reading, examples: Examples, score: torch.Tensor, weight: Floats, bias: float) -> Probe:
    """With the largest score of each text, and a threshold from the texts that are for it."""
    scores = np.full(len(examples.label), -np.inf)
    np.maximum.at(scores, examples.text, score.double().numpy())
    scores[np.isinf(scores)] = np.nan
    quiet = scores[examples.tune & ~examples.label]
    threshold = float(np.quantile(quiet, 1 - FALSE_POSITIVE_RATE, method="higher")) if len(quiet) else np.nan
    return Probe(reading, weight, bias, scores, threshold)


def _values(reads: Reads, reading: Reading, positions: npt.NDArray[np.int64], d_head: int) -> npt.NDArray[np.float32]:
    """``[M, width]``: the heads in their order, then the sites."""
    parts = []
    for head in reading.heads:
        columns = slice(head.head * d_head, (head.head + 1) * d_head)
        parts.append(reads.values[Site(head.layer, Stream.ATTN_Z)][:, columns][positions])
    parts += [reads.values[site][positions] for site in reading.sites]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _components(x: torch.Tensor, count: int) -> torch.Tensor:
    """``[width, count]`` principal directions of centred rows."""
    vectors: torch.Tensor = torch.linalg.eigh(x.double().T @ x.double()).eigenvectors
    return vectors[:, -count:].flip(1).float()
