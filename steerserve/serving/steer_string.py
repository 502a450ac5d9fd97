"""Steering written on one line, for the command line and the Python client.

An intervention:

    TARGET=OP[:VALUE][@PHASE][ if TARGET>NUMBER]

    TARGET  CONCEPT                       profanity
            SAE/FEATURE                   smollm2-l14/1234
            direction:FILE.npy@SITE       direction:calm.npy@blocks.14.hook_resid_post
            direction:FILE.npy@HEAD       direction:calm.npy@L12H5
            HEAD                          L12H5, for scale and block alone
    OP      clamp | clamp_always | clip | block | scale | add | monitor
    VALUE   a number, or a multiple of the recorded maximum activation: 2.5, -1x
    PHASE   all (default) | prompt | generated

A guard, which reads its target and acts when the score exceeds the number:

    TARGET>NUMBER=ACTION[@PHASE]

    ACTION  flag | redact | block | rewind:TOKENS[*RETRIES]

    behind a rewind: `` with INTERVENTION[; INTERVENTION]...[ else ACTION]``

Interventions are read from the right: the last ``=`` ends the target, the last ``/`` the name of the SAE and the
last ``@`` of a target the file, so that names and paths may hold any of them. What is written on one line fails
closed; ``Guard.fail_open`` is for those who write it out.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    Gate,
    Guard,
    GuardAction,
    HeadTarget,
    Intervention,
    Op,
    Phase,
    Rewind,
    Site,
    Target,
    Unit,
)

GRAMMAR = "TARGET=OP[:VALUE][@PHASE][ if TARGET>NUMBER]"
GUARD_GRAMMAR = (
    "TARGET>NUMBER=ACTION[@PHASE] with ACTION flag, redact, block or rewind:TOKENS[*RETRIES]; a rewind goes on with "
    "' with INTERVENTION[; INTERVENTION]...[ else flag]'"
)

_INTERVENTION = re.compile(
    r"(?P<target>.+)=(?P<op>\w+)(?::(?P<value>[^@\s]*))?(?:@(?P<phase>\w+))?"
    r"(?: if (?P<gate>.+)>(?P<threshold>[^>]*))?"
)
_GUARD = re.compile(
    r"(?P<target>.+?)>(?P<threshold>[^>=]*)=(?P<action>\w+)(?::(?P<tokens>\d{1,9})(?:\*(?P<retries>\d{1,9}))?)?"
    r"(?:@(?P<phase>\w+))?(?: with (?P<edits>.+?)(?: else (?P<otherwise>\w+))?)?"
)
_HEAD = re.compile(r"L\d+H\d+")
_CLAMP_ALWAYS = "clamp_always"
_OP_NAMES = (*Op, _CLAMP_ALWAYS)


def parse_intervention(text: str, field: str = "steer") -> Intervention:
    """Read one intervention, e.g. ``profanity=block`` or ``smollm2-l14/1234=scale:0.5@generated``.

    Args:
        field: what errors call the text.

    Raises:
        InvalidRequestError: the text does not follow the grammar, or its file holds no vector. Names
            are resolved, and values checked, by the server.
    """
    match = _INTERVENTION.fullmatch(text)
    if match is None:
        raise InvalidRequestError(field, text, f"{GRAMMAR}, e.g. 'profanity=block'")
    op, value = match["op"], match["value"]
    if op not in _OP_NAMES:
        raise InvalidRequestError(f"{field} (operation)", op, f"one of {', '.join(_OP_NAMES)}")
    number, unit = (None, Unit.RAW) if value is None else _parse_value(value, field)
    gate = match["gate"]
    return Intervention(
        target=_parse_target(match["target"], field),
        op=Op.CLAMP if op == _CLAMP_ALWAYS else Op(op),
        value=number,
        unit=unit,
        always=op == _CLAMP_ALWAYS,
        phase=_parse_phase(match["phase"], field),
        gate=None if gate is None else Gate(_parse_target(gate, field), _parse_threshold(match["threshold"], field)),
    )


def parse_guard(text: str, field: str = "guard") -> Guard:
    """Read one guard, e.g. ``profanity>1=block`` or ``profanity>1=rewind:8 with profanity=block``.

    Args:
        field: what errors call the text.

    Raises:
        InvalidRequestError: as ``parse_intervention``.
    """
    match = _GUARD.fullmatch(text)
    if match is None:
        raise InvalidRequestError(field, text, f"{GUARD_GRAMMAR}, e.g. 'profanity>1=block'")
    action = _parse_action(match["action"], field)
    rewinds = action is GuardAction.REWIND
    if {match["tokens"] is not None, match["edits"] is not None} != {rewinds}:
        expected = f"{GUARD_GRAMMAR}, e.g. 'profanity>1=rewind:8 with profanity=block'"
        raise InvalidRequestError(field, text, expected)
    return Guard(
        target=_parse_target(match["target"], field),
        threshold=_parse_threshold(match["threshold"], field),
        action=action,
        rewind=_parse_rewind(match, field) if rewinds else None,
        phase=_parse_phase(match["phase"], field),
    )


def _parse_rewind(match: re.Match[str], field: str) -> Rewind:
    edits = match["edits"].split("; ")
    return Rewind(
        num_tokens=int(match["tokens"]),
        edits=tuple(parse_intervention(edit, f"{field} (edit {i})") for i, edit in enumerate(edits)),
        max_retries=int(match["retries"] or 1),
        otherwise=_parse_action(match["otherwise"] or GuardAction.BLOCK, field),
    )


def _parse_action(text: str, field: str) -> GuardAction:
    if text not in set(GuardAction):
        raise InvalidRequestError(f"{field} (action)", text, f"one of {', '.join(GuardAction)}")
    return GuardAction(text)


def _parse_phase(text: str | None, field: str) -> Phase:
    if text is not None and text not in set(Phase):
        raise InvalidRequestError(f"{field} (phase)", text, f"one of {', '.join(Phase)}")
    return Phase(text or Phase.ALL)


def _parse_threshold(text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequestError(f"{field} (threshold)", text, "a number") from None


def _parse_target(text: str, field: str) -> Target:
    if text.startswith("direction:"):
        path, separator, place = text.removeprefix("direction:").rpartition("@")
        if not (path and separator):
            raise InvalidRequestError(f"{field} (target)", text, "direction:FILE.npy@SITE or direction:FILE.npy@HEAD")
        head = HeadTarget.parse(place, f"{field} (head)") if _HEAD.fullmatch(place) else None
        site = Site.parse(place, f"{field} (site)") if head is None else head.site
        return DirectionTarget(site, _load_vector(Path(path), field), None if head is None else head.head)
    if _HEAD.fullmatch(text):
        return HeadTarget.parse(text, f"{field} (head)")
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
