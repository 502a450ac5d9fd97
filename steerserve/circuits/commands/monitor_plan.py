"""``steerserve discover --monitor-plan``: from the circuits that were found to what a server watches."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from steerserve.circuits.feature_attribution import KL, attribute_features
from steerserve.circuits.monitoring.choice import CircuitHeads, HeadCount, choose_heads, count_heads
from steerserve.circuits.monitoring.examples import MAX_PER_KIND, Examples, LabelledTexts
from steerserve.circuits.monitoring.plans import Entries, entries_of_pairs, entries_of_probe, entry_of_features, plan_of
from steerserve.circuits.monitoring.probes import Reading, fit_reading
from steerserve.circuits.monitoring.reads import read_texts
from steerserve.circuits.prompts import PromptPairs
from steerserve.errors import InvalidRequestError
from steerserve.lab.commands.options import console, require_writable, sae_for
from steerserve.lab.corpus import Document, read_documents
from steerserve.lab.corpus import Split as TextSplit
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.monitor_plan import save_monitor_plan
from steerserve.types import Site, Stream

METRIC_OF_FEATURES = "log_odds"
"""In place of KL, which has no slope at the clean run."""
NUM_FEATURES = 16


@dataclass(frozen=True)
class Thresholds:
    """Which heads come into a plan: at most ``count``, the strongest of those that pass."""

    count: int
    min_frequency: float
    min_specificity: float


@dataclass(frozen=True, eq=False)
class PlanRequest:
    """What a plan is to be made of besides the circuits; checked before the search begins.

    Attributes:
        texts: labelled ones that a probe is fitted to; None: the prompt pairs give the directions.
    """

    path: Path
    thresholds: Thresholds
    controls: tuple[CircuitHeads, ...]
    texts: LabelledTexts | None
    saes: tuple[SAE, ...]

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        path: Path,
        thresholds: Thresholds,
        controls: Sequence[Path],
        texts: Sequence[Path],
        positive_label: Sequence[str],
        saes: Sequence[Path],
    ) -> PlanRequest:
        """Read the files that the options name.

        Raises:
            AssetError: a file is missing or damaged.
            IncompatibleError: an SAE is of another model.
            InvalidRequestError: the plan cannot be written, or there are texts without labels or the reverse.
        """
        require_plan(path)
        if bool(texts) != bool(positive_label):
            raise InvalidRequestError("--positive-label", list(positive_label), "given together with --texts")
        return cls(
            path,
            thresholds,
            tuple(map(CircuitHeads.read, controls)),
            LabelledTexts.choose(read_all(texts), positive_label, MAX_PER_KIND) if texts else None,
            tuple(sae_for(model, directory) for directory in saes),
        )

    def write(
        self, model: LoadedModel, pairs: PromptPairs, metric: str, files: Sequence[Path], bootstraps: int
    ) -> None:
        """The plan, from the circuits in ``files``.

        Raises:
            InvalidRequestError: no head passes the thresholds, or the metric has no slope.
        """
        circuits, limits = [CircuitHeads.read(path) for path in files], self.thresholds
        counts = count_heads(circuits, self.controls)
        chosen = choose_heads(counts, limits.count, limits.min_frequency, limits.min_specificity)
        parts = [entries_of_pairs(model, pairs, chosen) if self.texts is None else self._fitted(model, chosen)]
        slope = METRIC_OF_FEATURES if metric == KL else metric
        found = [attribute_features(model, sae, pairs, slope, NUM_FEATURES) for sae in self.saes]
        parts.append(Entries(tuple(entry for each in found if (entry := entry_of_features(each))), {}, {}))
        protocol = {
            "heads_in_circuits": len(counts),
            "min_frequency": limits.min_frequency,
            "min_specificity": limits.min_specificity,
            "controls": {each.name: each.sha256 for each in self.controls},
            "vectors": "difference of means, prompt pairs" if self.texts is None else "probe on labelled texts",
        }
        command = shlex.join(["steerserve", *sys.argv[1:]])
        plan, vectors = plan_of(self.path.stem, pairs.name, model, parts, circuits, bootstraps, command, protocol)
        save_monitor_plan(plan, vectors, self.path)
        console.print(_table(chosen, f"{self.path}: {len(chosen)} of {len(counts)} heads, {len(circuits)} circuits"))

    def _fitted(self, model: LoadedModel, chosen: Sequence[HeadCount]) -> Entries:
        """One probe on all heads."""
        assert self.texts is not None
        heads = tuple(each.head for each in chosen)
        sites = sorted({Site(head.layer, Stream.ATTN_Z) for head in heads})
        residual = Site(model.n_layers // 2, Stream.RESID_POST)  # says which positions are ordinary
        with TemporaryDirectory() as directory:
            reads = read_texts(model, self.texts.texts, [*sites, residual], Path(directory))
            examples = Examples.of_texts(reads, self.texts)
            return entries_of_probe(fit_reading(reads, Reading(heads), examples, model.d_head), chosen, model.d_head)


def require_plan(path: Path) -> None:
    """Raise InvalidRequestError, before the work, if a plan could not be written there."""
    if path.suffix != ".json":
        raise InvalidRequestError("--monitor-plan", str(path), "a name that ends in .json")
    require_writable("--monitor-plan", path)


def read_all(texts: Sequence[Path]) -> list[Document]:
    """Documents of every split."""
    return [document for split in TextSplit for document in read_documents(texts, split)]


def _table(chosen: Sequence[HeadCount], title: str) -> Table:
    table = Table("head", "effect", "frequency", "specificity", title=title)
    for each in chosen:
        specificity = "" if each.specificity is None else f"{each.specificity:.2f}"
        table.add_row(str(each.head), f"{each.effect:.3g}", f"{each.frequency:.2f}", specificity)
    return table
