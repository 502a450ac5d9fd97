"""One search for a circuit: the receivers, from the logits backwards, and their edges in batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from steerserve.circuits.ablation import Baseline
from steerserve.circuits.circuit import Circuit
from steerserve.circuits.discovery import Counts, Decision, Discovery
from steerserve.circuits.graph import Graph, Liveness, descendants
from steerserve.circuits.metrics import Metric
from steerserve.circuits.propagation import Propagation
from steerserve.circuits.settings import ACDCConfig
from steerserve.circuits.trials import Trials, values
from steerserve.errors import IncompatibleError

NOISE_MARGIN = 4.0
"""An effect within so many times the measured noise of the threshold is not trusted."""
ROUNDING = 4.0
"""Units of rounding that the noise is at least: where a search starts, at a KL of 0, there is next to none to see."""
FIRST_ROWS = 4
"""Tests in the first batch of a receiver; twice as many after each batch of removals alone."""


class Search:
    """The circuit so far, the decisions that led to it, and the receivers that are left, the last one first."""

    def __init__(self, graph: Graph, baseline: Baseline, metric: Metric, config: ACDCConfig) -> None:
        self._circuit = Circuit.whole(graph, baseline)
        self._metric = metric
        self._config = config
        self._decisions: list[Decision] = []
        self._num_tests = 0
        rounding = ROUNDING * torch.finfo(baseline.model.dtype).eps
        self._counts = Counts(sequence_layers_every_edge=graph.num_edges * self._sequence_layers_naive, noise=rounding)
        self._receivers = list(range(len(graph.receivers)))
        self._value = self._measure()
        self._heed(values(metric, baseline.clean_logits[None])[0])

    @property
    def is_complete(self) -> bool:
        return not self._receivers

    def found(self) -> Discovery:
        graph = self._circuit.graph
        return Discovery(graph, self._cfg(), tuple(self._decisions), replace(self._counts), self._value)

    def decide_next(self) -> None:
        """Test the edges into the next receiver."""
        start = time.perf_counter()
        receiver = self._receivers.pop()
        circuit = self._circuit
        live = Liveness.of(circuit.graph, circuit.present)
        sources = self._config.parents(circuit.graph, receiver)
        if live.receivers[receiver]:
            self._test(Trials(replace(circuit, live=live), receiver, self._metric, self._counts), receiver, sources)
        else:
            present = circuit.present.copy()
            present[receiver] = False
            self._circuit = replace(circuit, present=present)
            self._decisions += [Decision(receiver, source, False, 0.0, None) for source in sources]
        self._counts.seconds += time.perf_counter() - start

    def _test(self, trials: Trials, receiver: int, sources: list[int]) -> None:
        most = max(1, min(self._config.max_rows, self._config.max_bytes // trials.work.num_bytes))
        num_rows = min(FIRST_ROWS, most)
        while sources:
            batch = sources[:num_rows]
            num_decided = self._test_batch(trials, receiver, batch)
            del sources[:num_decided]
            all_removed = num_decided == len(batch) and not self._decisions[-1].kept
            num_rows = min(2 * num_rows, most) if all_removed else max(1, num_rows // 2)
        self._circuit, value = trials.settle()
        self._heed(value)
        self._value = value

    def _test_batch(self, trials: Trials, receiver: int, sources: Sequence[int]) -> int:
        """Remove ``sources`` up to the first that is to be kept; returns how many are decided."""
        measured = trials.without(sources)
        self._counts.rows += len(sources)
        for j, (source, value) in enumerate(zip(sources, measured, strict=True)):
            effect = value - self._value
            if self._is_near(effect):
                # The batch assumes that the sources before this one are removed, and so do these two runs.
                effect = trials.effect_again(sources[:j], source)
                self._counts.retested += 1
            kept = effect >= self._config.threshold
            self._decisions.append(Decision(receiver, source, kept, effect, self._num_tests))
            self._num_tests += 1
            self._counts.tested += 1
            self._counts.sequence_layers_naive += self._sequence_layers_naive
            if kept:
                trials.remove(sources[:j])
                self._counts.void += len(sources) - j - 1
                return j + 1
            self._value = value
        trials.remove(sources)
        return len(sources)

    def _is_near(self, effect: float) -> bool:
        return abs(effect - self._config.threshold) <= NOISE_MARGIN * self._counts.noise

    def _heed(self, value: float) -> None:
        """Compare with another computation of ``self._value``."""
        self._counts.noise = max(self._counts.noise, abs(value - self._value))

    def resume(self, earlier: Discovery, path: Path) -> None:
        """Take up an earlier search where it was left.

        Raises:
            IncompatibleError: it was another one.
        """
        for key, value in self._cfg().items():
            if earlier.cfg.get(key) != value:
                raise IncompatibleError(f"{path}: {key}", earlier.cfg.get(key), f"{value!r}, as in this search")
        self._counts = earlier.counts
        self._restore(earlier.decisions)

    def take_over(self, earlier: Discovery) -> None:
        """Take over the decisions that would be the same at this higher threshold, by whole receivers."""
        self._counts.noise = earlier.counts.noise
        others = {each.receiver for each in earlier.decisions if each.kept and self._would_change(each.effect)}
        same = tuple(takewhile(lambda each: each.receiver not in others, earlier.decisions))
        self._restore(same)

    def _would_change(self, effect: float) -> bool:
        return effect < self._config.threshold or self._is_near(effect)

    def _restore(self, decisions: Sequence[Decision]) -> None:
        """The state right after ``decisions``."""
        graph, present = self._circuit.graph, self._circuit.graph.full.copy()
        for each in decisions:
            present[each.receiver, each.source] = each.kept
        circuit = replace(self._circuit, present=present, live=Liveness.of(graph, present))
        tested = {each.receiver for each in decisions if each.test is not None}
        changed = descendants(graph, present, tested, circuit.live)
        deltas, _ = Propagation(circuit, changed, fold=False).run({})
        self._circuit = replace(circuit, deltas={**circuit.deltas, **deltas})
        self._decisions = list(decisions)
        self._num_tests = sum(each.test is not None for each in decisions)
        self._receivers = self._receivers[: len(self._receivers) - len({each.receiver for each in decisions})]
        self._value = self._measure()

    def _measure(self) -> float:
        logits = self._circuit.baseline.model.logits(self._circuit.input_of(len(self._circuit.graph.receivers) - 1))
        return values(self._metric, logits[:, :, 0])[0]

    @property
    def _sequence_layers_naive(self) -> int:
        return self._circuit.baseline.num_prompts * self._circuit.graph.n_layers

    def _cfg(self) -> dict[str, Any]:
        """The search, as JSON values: equal for equal searches."""
        graph, baseline = self._circuit.graph, self._circuit.baseline
        return {
            **baseline.cfg,
            "n_layers": graph.n_layers,
            "n_heads": graph.n_heads,
            "n_kv_heads": graph.n_kv_heads,
            "d_model": baseline.model.d_model,
            "parallel_attn_mlp": graph.parallel,
            "split_qkv_input": graph.split,
            "kv": graph.kv,
            "metric": self._metric.name,
            "metric_meaning": self._metric.meaning,
            "threshold": self._config.threshold,
            "order": self._config.order.value,
            "seed": self._config.seed,
        }
