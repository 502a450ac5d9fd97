"""Steering written on one line, for the command line and the Python client.

    TARGET=OP[:VALUE][@PHASE]

    TARGET  CONCEPT                       profanity
            SAE/FEATURE                   smollm2-l14/1234
            direction:FILE.npy@SITE       direction:calm.npy@blocks.14.hook_resid_post
    OP      clamp | clamp_always | clip | block | scale | add | monitor
    VALUE   a number, or a multiple of the recorded maximum activation: 2.5, -1x
    PHASE   all (default) | prompt | generated

Read from the right: the last ``=`` ends the target, the last ``/`` the name of the SAE and the last
``@`` of a target the file, so that names and paths may hold any of them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.types import ConceptTarget, DirectionTarget, FeatureTarget, Intervention, Op, Phase, Site, Target, Unit

GRAMMAR = "TARGET=OP[:VALUE][@PHASE]"

_ACTION = re.compile(r"(?P<op>\w+)(?::(?P<value>[^@]*))?(?:@(?P<phase>\w+))?")
_CLAMP_ALWAYS = "clamp_always"
_OP_NAMES = (*Op, _CLAMP_ALWAYS)


def parse_intervention(text: str, field: str = "steer") -> Intervention:
    """Read one intervention, e.g. ``profanity=clamp:-1x`` or ``smollm2-l14/1234=scale:0.5@generated``.

    Args:
        field: what errors call the text.

    Raises:
        InvalidRequestError: the text does not follow the grammar, or its file holds no vector. Names
            are resolved, and values checked, by the server.
    """
    target, separator, action = text.rpartition("=")
    match = _ACTION.fullmatch(action)
    if not (target and separator and match):
        raise InvalidRequestError(field, text, f"{GRAMMAR}, e.g. 'profanity=clamp:-1x'")
    op, value, phase = match["op"], match["value"], match["phase"] or Phase.ALL
    if op not in _OP_NAMES:
        raise InvalidRequestError(f"{field} (operation)", op, f"one of {', '.join(_OP_NAMES)}")
    if phase not in set(Phase):
        raise InvalidRequestError(f"{field} (phase)", phase, f"one of {', '.join(Phase)}")
    number, unit = (None, Unit.RAW) if value is None else _parse_value(value, field)
    return Intervention(
        target=_parse_target(target, field),
        op=Op.CLAMP if op == _CLAMP_ALWAYS else Op(op),
        value=number,
        unit=unit,
        always=op == _CLAMP_ALWAYS,
        phase=Phase(phase),
    )


def _parse_target(text: str, field: str) -> Target:
    if text.startswith("direction:"):
        path, separator, site = text.removeprefix("direction:").rpartition("@")
        if not (path and separator):
            raise InvalidRequestError(f"{field} (target)", text, "direction:FILE.npy@SITE")
        return DirectionTarget(Site.parse(site, f"{field} (site)"), _load_vector(Path(path), field))
    sae, separator, feature = text.rpartition("/")
    if not separator:
        return ConceptTarget(text)
    if not (sae and feature.isascii() and feature.isdecimal()):
        raise InvalidRequestError(
            f"{field} (target)", text, "SAE/FEATURE with FEATURE an index, e.g. 'smollm2-l14/1234'"
        )
    return FeatureTarget(sae, int(feature))


def _parse_value(text: str, field: str) -> tuple[float, Unit]:
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        raise InvalidRequestError(f"{field} (value)", text, "a number, or a multiple such as '2.0x'") from None
    return number, Unit.MAX_ACTIVATION if text.endswith("x") else Unit.RAW


def _load_vector(path: Path, field: str) -> np.ndarray:
    expected = "a .npy file with one vector of real numbers"
    try:
        vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidRequestError(f"{field} (direction)", str(path), f"{expected} ({error})") from None
    if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype.kind not in "fiu":
        raise InvalidRequestError(f"{field} (direction)", str(path), expected)
    return vector.astype(np.float32)
