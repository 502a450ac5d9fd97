"""Is an SAE what its files say? Its figures on a sample of text, against declared ones and against what is possible.

A wrong scale, hook point or model does not show in the files: every tensor is there and finite. It shows in
use: an SAE that was trained on x · s and reads x has a hundred times its L0, or none; one that reads another
hook point explains less than the mean activation does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steerserve.errors import AssetError
from steerserve.sae.formats.files import read_json
from steerserve.sae.model import SAE

EVALUATION = "evaluation.json"
"""Beside an SAE: what the lab did with it and measured of it."""

L0_FACTOR = 2.0
"""Texts differ, and so do the positions that are left out; a wrong scale moves L0 by more."""
FVU_MARGIN = 0.2
LEAST_L0 = 0.5
_DECLARED = ("l0", "fvu")


@dataclass(frozen=True)
class Declared:
    """What the files say; None where they do not."""

    l0: float | None = None
    fvu: float | None = None

    @classmethod
    def of(cls, sae: SAE, directory: Path) -> Declared:
        """From ``evaluation.json`` beside the SAE, or else what its format says of L0; a TopK SAE declares its k.

        Raises:
            AssetError: that file is damaged.
        """
        path = directory / EVALUATION
        figures = read_json(path).get("evaluation", {}) if path.is_file() else {}
        if not isinstance(figures, dict) or not all(
            isinstance(figures.get(name, 0), int | float) for name in _DECLARED
        ):
            raise AssetError(f"{path} is damaged: expected numbers as {' and '.join(_DECLARED)} of its evaluation")
        l0 = sae.k if sae.k is not None else sae.metadata.get("declared_l0")
        return cls(figures.get("l0", l0), figures.get("fvu"))


def implausible(sae: SAE, l0: float, fvu: float, declared: Declared) -> list[str]:
    """Why these figures of ``sae`` cannot be right; empty if they can."""
    reasons = []
    if not fvu < 1:
        reasons.append(f"FVU is {fvu:.3g}: the mean activation alone would leave 1 (wrong scale, hook point or model?)")
    if l0 < LEAST_L0:
        reasons.append(f"L0 is {l0:.3g}: hardly any feature fires (wrong scale or model?)")
    if l0 > sae.d_in:
        reasons.append(
            f"L0 is {l0:.4g}: more features fire than the activation has dimensions, {sae.d_in} (wrong scale?)"
        )
    if declared.l0 and not 1 / L0_FACTOR <= l0 / declared.l0 <= L0_FACTOR:
        reasons.append(f"L0 is {l0:.4g}, declared {declared.l0:.4g}: more than a factor of {L0_FACTOR:g} apart")
    if declared.fvu is not None and fvu > declared.fvu + FVU_MARGIN:
        reasons.append(f"FVU is {fvu:.3g}, declared {declared.fvu:.3g}: more than {FVU_MARGIN:g} above")
    return reasons
