"""A pack before its strength is chosen: rows, what they are set to, and what reads the concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steerserve.lab.concept_build.detectors import Detector
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.lab.concept_eval.caps import capped
from steerserve.lab.concept_eval.trial import Direction
from steerserve.models.loading import LoadedModel
from steerserve.steering.packs import ConceptPack, DetectorCard, ModelRef, PackCard, PackTensors, PolicyAction, SAERef
from steerserve.types import Op, Site


@dataclass(frozen=True, eq=False)
class PackDraft:
    """What a pack of one concept is made of; one item of each list a site.

    Attributes:
        edited: rows that the policy edits.
        value: their operands at strength 0 (suppress) or 1 (amplify), ``[k]`` each.
        step: what one unit of strength lowers an operand by when suppressing, ``[k]`` each.
    """

    name: str
    description: str
    op: Op
    direction: Direction
    edited: Sequence[SiteRows]
    value: Sequence[torch.Tensor]
    step: Sequence[torch.Tensor]
    detector: Detector

    def pack(self, model: LoadedModel, strength: float, data: dict[str, Any]) -> ConceptPack:
        """The pack at some strength, not on disk and so without a hash."""
        sites = sorted({part.site for part in (*self.edited, self.detector.rows)})
        rows = [row for index, site in enumerate(sites) for row in self._at(site, index, strength)]
        tensors = PackTensors(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
        saes = {
            str(part.site): SAERef(name=part.sae.name, sha256=part.sae.sha256)
            for part in (*self.edited, self.detector.rows)
            if part.sae is not None
        }
        card = PackCard(
            name=self.name,
            version="1",
            description=self.description,
            model=ModelRef(name=model.name, fingerprint=model.fingerprint),
            saes=saes,
            sites=[str(site) for site in sites],
            policy=PolicyAction(op=self.op),
            detector=DetectorCard(
                kind=self.detector.kind,
                site=str(self.detector.rows.site),
                threshold=self.detector.threshold,
                auroc_features=self.detector.auroc_features,
                auroc_probe=self.detector.auroc_probe,
            ),
            data=data,
        )
        return ConceptPack(card, tensors, "")

    def _at(self, site: Site, index: int, strength: float) -> list[_Row]:
        """The rows of a site: edited ones, then those that only the detector reads."""
        detector = self.detector.rows if self.detector.rows.site == site else None
        rows: list[_Row] = []
        for part, value, step in zip(self.edited, self.value, self.step, strict=True):
            if part.site == site:
                operand = value - strength * step if self.direction is Direction.SUPPRESS else strength * value
                for i in range(len(part)):
                    row = _row(part, i, index) | {"edited": np.True_, "value": operand[i].numpy()}
                    if self.op is Op.CLIP and part.feature_ids[i] < 0:
                        row |= capped(row["b_enc"], row["value"], row["max_activation"])
                    rows.append(row)
        if detector is not None:
            edited = {int(row["feature_ids"]): row for row in rows if row["feature_ids"] >= 0}
            for i, feature in enumerate(detector.feature_ids):
                if feature not in edited:  # one that is edited too is one row; a probe is none of the directions
                    rows.append(_row(detector, i, index))
                edited.get(feature, rows[-1])["weight"] = self.detector.weight[i].numpy()
        return rows


_Row = dict[str, Any]
"""One row of every tensor of a pack."""


def _row(part: SiteRows, i: int, site: int) -> _Row:
    names = ("W_enc", "b_enc", "threshold", "max_norm", "W_dec", "max_activation")
    return {
        "site": np.int64(site),
        **{name: getattr(part, name)[i].float().numpy() for name in names},
        "edited": np.False_,
        "value": np.float32(0),
        "weight": np.float32(0),
        "feature_ids": np.int64(part.feature_ids[i]),
    }
