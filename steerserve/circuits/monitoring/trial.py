"""Do the heads that a circuit names tell its behaviour better than others? A comparison by a protocol fixed beforehand.

**Behaviour**: labelled texts that show it (positive) against texts that do not (negative). Two questions are asked:

- *text*: does a text show it? The score of a text is that of its highest token, over its first 48 tokens.
- *ahead*: is the next word one of a word list? Of positive texts with a listed word, the token before the first one
  (the third at least); of negative texts without, a token at one of the same distances from the start, drawn at random.
  The reading has not seen the word. This is the question that the circuit was searched for.

**Texts** are split by their own hash. The 30 % from which no prompt pair may come (``Split.HELD_OUT`` of the circuits)
are for testing, the last 10 % of the others' range for the threshold, the rest for fitting. Every split takes all texts
of the rarer kind, at most 1,400, and as many of the other, in an order that follows from their hash.

**Readings**, all of K · d_head values, which is the width of the residual stream for the K that is compared first
(9 heads of 64 in SmolLM2-135M):

- *circuit*: the outputs z of the K heads with the largest effect in the behaviour's circuits, with a frequency of at
  least one half
- *random*: K heads drawn from all, ``NUM_RANDOM`` times; *random, same layers*: drawn layer by layer as many as the
  circuit has there, itself left out where there are others, as often
- *EAP-IG*: the K heads whose outgoing edges have the largest sum of |score|, on 16 prompt pairs
- *middle layer*: ``resid_post`` of layer n_layers / 2, whole, or its first K · d_head principal components on the texts
  for fitting where that is less
- other residual streams, as references: they are no part of the verdict

**One probe** for each, fitted jointly on all its values as the detectors of concept packs are: standardised, logistic,
L2, both kinds counting the same, on the softmax-pooled scores of a text's tokens (``lab.pooled_probe``); for *ahead* on
the one token. No setting differs between readings, and none is tuned.

**Figures** are of test texts: AUROC, and the share of positive texts above the score that 1 % of negative texts exceed.
Intervals are percentiles over 2,000 resamples of the test texts, the same for all readings, so that differences are
paired. **Verdict**, on *text* and AUROC: the circuit beats random heads if the interval of its AUROC less the mean of
the random draws' lies above 0; the same against the middle layer. The winner is the reading that no other of *circuit*,
*EAP-IG* and *middle layer* beats in this sense; among several, the one that reads fewer sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from steerserve.circuits.monitoring.choice import Head
from steerserve.circuits.monitoring.examples import Examples
from steerserve.circuits.monitoring.probes import FALSE_POSITIVE_RATE, Fitting, Probe, Reading
from steerserve.errors import InvalidRequestError
from steerserve.types import Site, Stream

NUM_RANDOM = 20
DRAWS = 2000

CIRCUIT, RANDOM, SAME_LAYERS = "circuit", "random heads", "random heads, same layers"
EAP_IG, MIDDLE = "EAP-IG", "middle layer"
CANDIDATES = (CIRCUIT, EAP_IG, MIDDLE)
"""Of which one wins."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Measured:
    """Figures of one reading: the estimate on the test texts, then one for each resample."""

    auroc: Floats
    detection: Floats


def draw_heads(n_layers: int, n_heads: int, count: int, draws: int, seed: int = 0) -> list[tuple[Head, ...]]:
    """``draws`` times ``count`` different heads of all."""
    rng = np.random.default_rng(seed)
    each = (rng.choice(n_layers * n_heads, size=count, replace=False) for _ in range(draws))
    return [tuple(sorted(Head(int(i) // n_heads, int(i) % n_heads) for i in drawn)) for drawn in each]


def draw_same_layers(like: Sequence[Head], n_heads: int, draws: int, seed: int = 1) -> list[tuple[Head, ...]]:
    """As many heads of every layer as ``like`` has there, others while there are any."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        heads: list[Head] = []
        for layer in sorted({head.layer for head in like}):
            own = [head.head for head in like if head.layer == layer]
            others = rng.permutation([head for head in range(n_heads) if head not in own])
            order = [*others, *rng.permutation(own)]
            heads += [Head(layer, int(head)) for head in order[: len(own)]]
        drawn.append(tuple(sorted(heads)))
    return drawn


class Resampled:
    """Figures on resamples of the test texts, the same for every reading."""

    def __init__(self, label: Bools, draws: int = DRAWS) -> None:
        """``label`` ``[n]`` of the test texts.

        Raises:
            InvalidRequestError: they are all of one kind.
        """
        if label.all() or not label.any():
            raise InvalidRequestError("texts", len(label), "texts of both kinds for testing")
        rng = np.random.default_rng(0)
        n = len(label)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws)
        self._weight = np.concatenate([np.ones((1, n)), drawn]).astype(np.float64)
        self._label = label

    def measure(self, scores: Floats) -> Measured:
        """Figures of finite ``scores`` ``[n]``."""
        order = np.argsort(scores, kind="stable")
        _, first = np.unique(scores[order], return_index=True)
        weight, label = self._weight[:, order], self._label[order]
        positive = np.add.reduceat(np.where(label, weight, 0.0), first, axis=1)
        negative = np.add.reduceat(np.where(label, 0.0, weight), first, axis=1)
        below = np.cumsum(negative, axis=1)
        totals = positive.sum(1), below[:, -1]
        with np.errstate(invalid="ignore"):  # a resample without texts of one kind has no value
            auroc = (positive * (below - negative / 2)).sum(1) / (totals[0] * totals[1])
            # The lowest cut that 1 % of the negative texts exceed at most: everything above it is detected.
            quiet = totals[1][:, None] - below <= FALSE_POSITIVE_RATE * totals[1][:, None]
            cut = quiet.argmax(1)
            above = totals[0] - np.take_along_axis(np.cumsum(positive, axis=1), cut[:, None], axis=1)[:, 0]
            return Measured(auroc, above / totals[0])


def interval(values: Floats) -> dict[str, float]:
    """The estimate with its 95 % interval."""
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def readings_of(
    circuit: Sequence[Head], eap_ig: Sequence[Head], n_layers: int, n_heads: int, d_head: int, others: Iterable[Site]
) -> dict[str, list[Reading]]:
    """All readings of one comparison, by name; K is the number of heads of ``circuit``.

    Args:
        others: residual streams that are read for reference, whole.
    """
    count, width = len(circuit), n_heads * d_head
    components = 0 if count * d_head >= width else count * d_head
    middle = Site(n_layers // 2, Stream.RESID_POST)
    return {
        CIRCUIT: [Reading(heads=tuple(circuit))],
        RANDOM: [Reading(heads=heads) for heads in draw_heads(n_layers, n_heads, count, NUM_RANDOM)],
        SAME_LAYERS: [Reading(heads=heads) for heads in draw_same_layers(circuit, n_heads, NUM_RANDOM)],
        EAP_IG: [Reading(heads=tuple(eap_ig[:count]))],
        MIDDLE: [Reading(sites=(middle,), components=components)],
        **{f"layer {site.layer}": [Reading(sites=(site,))] for site in others if site != middle},
    }


@dataclass(frozen=True, eq=False)
class Outcome:
    """One comparison on one question.

    Attributes:
        probes: by name, those that the protocol has one of.
        measured: by name, one for each reading.
    """

    examples: Examples
    readings: dict[str, list[Reading]]
    probes: dict[str, Probe]
    measured: dict[str, list[Measured]]

    @property
    def unbeaten(self) -> list[str]:
        """Of the readings that may win those that no other beats on AUROC, the one with the fewest sites first."""

        def beats(one: str, other: str) -> bool:
            return interval(self.measured[one][0].auroc - self.measured[other][0].auroc)["low"] > 0

        names = [name for name in CANDIDATES if not any(beats(other, name) for other in CANDIDATES if other != name)]
        return sorted(names, key=lambda name: self.readings[name][0].num_sites)

    def to_json(self) -> dict[str, Any]:
        """Figures of every reading, and of the circuit's less those of the others."""
        rows: dict[str, dict[str, Any]] = {}
        for name, each in self.measured.items():
            mean = Measured(np.mean([m.auroc for m in each], 0), np.mean([m.detection for m in each], 0))
            rows[name] = {"auroc": interval(mean.auroc), "detection": interval(mean.detection)}
            if len(each) > 1:
                figures = ("auroc", "detection")
                rows[name]["each"] = {of: [float(getattr(m, of)[0]) for m in each] for of in figures}
            elif name in self.readings:
                rows[name]["reads"] = [*map(str, self.readings[name][0].heads), *map(str, self.readings[name][0].sites)]
        return {
            "examples": self.examples.counts(),
            "readings": rows,
            "circuit_less": {name: _less(self.measured[CIRCUIT][0], each) for name, each in self.measured.items()},
            "unbeaten": self.unbeaten,
        }


def run_trial(fitting: Fitting, readings: dict[str, list[Reading]], given: Mapping[str, Probe]) -> Outcome:
    """Fit and measure every reading; ``given`` are probes that are fitted already, for reference.

    Raises:
        InvalidRequestError: the test texts are all of one kind.
    """
    examples = fitting.examples
    resampled = Resampled(examples.label[examples.test])
    probes: dict[str, Probe] = dict(given)
    measured = {name: [resampled.measure(probe.scores[examples.test])] for name, probe in given.items()}
    for name, group in readings.items():
        fitted = [fitting.fit(reading) for reading in track(group, name)]
        measured[name] = [resampled.measure(probe.scores[examples.test]) for probe in fitted]
        if len(fitted) == 1:
            probes[name] = fitted[0]
    return Outcome(examples, readings, probes, measured)


def _less(one: Measured, others: Sequence[Measured]) -> dict[str, Any]:
    """Figures of ``one`` less the mean of the others', draw by draw, and how many of the others it exceeds."""
    result: dict[str, Any] = {}
    for name in ("auroc", "detection"):
        values = np.stack([getattr(other, name) for other in others])
        result[name] = interval(getattr(one, name) - values.mean(0))
        result[name]["exceeds"] = int((getattr(one, name)[0] > values[:, 0]).sum())
        result[name]["of"] = len(others)
    return result
