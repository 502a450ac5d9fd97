"""ACDC (Conmy et al. 2023, Algorithm 1): which edges a behaviour needs, exactly.

From the logits backwards, every edge is removed unless that adds at least a threshold τ to the metric. The result is
that of one full pass per edge, one edge after the other; it is had for less, by facts alone:

- upstream of the receiver under test every edge is still there, so that its parents' outputs are the clean ones
- downstream only live nodes matter, and of these only the descendants of the receiver change
- a receiver without a path to the logits has no effect: its edges go untested
- where no key or value depends on it, a node counts at the last position only
- most tests end in removal: a batch of rows tests one edge each, row j assuming that those before j are removed; what
  follows the first edge that is kept is void

Rows of another batch differ in rounding. That noise is measured, and a test that comes as close to τ is taken again
at a fixed batch shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from steerserve.circuits.ablation import Baseline
from steerserve.circuits.discovery import Discovery
from steerserve.circuits.graph import Graph
from steerserve.circuits.metrics import Metric
from steerserve.circuits.search import Search
from steerserve.circuits.settings import ACDCConfig

SAVE_EVERY_S = 60.0

Report = Callable[[Discovery], None]
"""Gets what a search has found so far; ``num_remaining`` of it says how far it is."""


@torch.no_grad()
def discover(
    graph: Graph,
    baseline: Baseline,
    metric: Metric,
    config: ACDCConfig,
    checkpoint: Path | None = None,
    report: Report = lambda _: None,
) -> Discovery:
    """Find the circuit of a behaviour.

    Args:
        metric: larger is worse.
        checkpoint: file of the result; saved every minute, and taken up where it was left: with the same decisions in
            the end as without a break.
        report: called whenever a receiver is decided, with what is found so far.

    Raises:
        AssetError: the checkpoint cannot be read.
        IncompatibleError: the checkpoint is of another search.
        InvalidRequestError: the metric is not finite.
    """
    (found,) = sweep(graph, baseline, metric, config, [config.threshold], lambda _: checkpoint, report)
    return found


@torch.no_grad()
def sweep(
    graph: Graph,
    baseline: Baseline,
    metric: Metric,
    config: ACDCConfig,
    thresholds: Iterable[float],
    checkpoint: Callable[[float], Path | None] = lambda _: None,
    report: Report = lambda _: None,
) -> list[Discovery]:
    """Find the circuit at each threshold, in ascending order; arguments and errors as of ``discover``.

    Two searches take the same decisions until the first edge whose effect lies between their thresholds. What the one
    before has decided up to that edge's receiver is taken over; ``counts`` are of what was then left to do.
    """
    found: list[Discovery] = []
    for threshold in sorted(thresholds):
        search, path = Search(graph, baseline, metric, replace(config, threshold=threshold)), checkpoint(threshold)
        if path is not None and path.exists():
            search.resume(Discovery.load(path, graph), path)
        elif found:
            search.take_over(found[-1])
        found.append(_finished(search, path, report))
    return found


def _finished(search: Search, checkpoint: Path | None, report: Report) -> Discovery:
    saved = time.monotonic()
    while not search.is_complete:
        search.decide_next()
        report(search.found())
        if checkpoint is not None and (search.is_complete or time.monotonic() - saved > SAVE_EVERY_S):
            search.found().save(checkpoint)
            saved = time.monotonic()
    return search.found()
