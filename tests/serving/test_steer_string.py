"""The one-line form of an intervention: what it means, and what is said when it means nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steerserve import (
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
    Unit,
    parse_guard,
    parse_intervention,
)
from steerserve.errors import InvalidRequestError

PROFANITY = ConceptTarget("profanity")
CLAMPED = Intervention(PROFANITY, Op.CLAMP, -2.0, Unit.MAX_ACTIVATION)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("profanity=block", Intervention(PROFANITY, Op.BLOCK)),
        ("profanity=clamp:-1x", Intervention(PROFANITY, Op.CLAMP, -1.0, Unit.MAX_ACTIVATION)),
        ("profanity=clamp_always:2.5", Intervention(PROFANITY, Op.CLAMP, 2.5, always=True)),
        ("profanity=monitor@prompt", Intervention(PROFANITY, Op.MONITOR, phase=Phase.PROMPT)),
        ("L12H5=scale:0.5", Intervention(HeadTarget(12, 5), Op.SCALE, 0.5)),
        ("L0H0=block@generated", Intervention(HeadTarget(0, 0), Op.BLOCK, phase=Phase.GENERATED)),
        ("L12H5b=block", Intervention(ConceptTarget("L12H5b"), Op.BLOCK)),
        ("sae/1234=scale:0.5", Intervention(FeatureTarget("sae", 1234), Op.SCALE, 0.5)),
        (
            "org/sae/0=clip:1e2@generated",
            Intervention(FeatureTarget("org/sae", 0), Op.CLIP, 100.0, phase=Phase.GENERATED),
        ),
        ("a=b/3=add:1@all", Intervention(FeatureTarget("a=b", 3), Op.ADD, 1.0)),
        ("profanity=block if anger>0.5", Intervention(PROFANITY, Op.BLOCK, gate=Gate(ConceptTarget("anger"), 0.5))),
        (
            "sae/1=clamp:2x@generated if a=b>c/3>-1e-1",
            Intervention(
                FeatureTarget("sae", 1),
                Op.CLAMP,
                2.0,
                Unit.MAX_ACTIVATION,
                phase=Phase.GENERATED,
                gate=Gate(FeatureTarget("a=b>c", 3), -0.1),
            ),
        ),
    ],
)
def test_reading(text: str, expected: Intervention) -> None:
    assert parse_intervention(text) == expected


@pytest.mark.parametrize("name", ["calm.npy", "a=b@c/d.npy"])
def test_reading_a_direction(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    np.save(file, np.arange(4))
    read = parse_intervention(f"direction:{file}@blocks.14.hook_resid_post=add:4.0")
    assert isinstance(read.target, DirectionTarget)
    assert read.target.site == Site.parse("blocks.14.hook_resid_post")
    assert read.target.vector.dtype == np.float32
    assert read.target.vector.tolist() == [0, 1, 2, 3]
    assert (read.op, read.value) == (Op.ADD, 4.0)


def test_reading_a_direction_of_a_head(tmp_path: Path) -> None:
    np.save(tmp_path / "calm.npy", np.arange(4))
    read = parse_guard(f"direction:{tmp_path / 'calm.npy'}@L12H5>0.5=flag").target
    assert isinstance(read, DirectionTarget)
    assert (str(read.site), read.head, read.vector.tolist()) == ("blocks.12.attn.hook_z", 5, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "steer"),
        ("profanity", "steer"),
        ("=block", "steer"),
        ("profanity=", "steer"),
        ("profanity=clamp:1@prompt@all", "steer"),
        ("profanity=explode", "steer (operation)"),
        ("profanity=clamp:loud", "steer (value)"),
        ("profanity=clamp:", "steer (value)"),
        ("profanity=clamp:1xx", "steer (value)"),
        ("profanity=block@never", "steer (phase)"),
        ("sae/first=block", "steer (target)"),
        ("sae/-1=block", "steer (target)"),
        ("/1=block", "steer (target)"),
        ("direction:calm.npy=add:1", "steer (target)"),
        ("direction:calm.npy@layer 3=add:1", "steer (site)"),
        ("L12345H5=block", "steer (head)"),
        ("direction:no/such.npy@blocks.1.hook_resid_post=add:1", "steer (direction)"),
        ("profanity=block if anger", "steer"),
        ("profanity=block if >1", "steer"),
        ("profanity=clamp:1 if anger", "steer"),
        ("profanity=block if anger>", "steer (threshold)"),
        ("profanity=block if anger>loud", "steer (threshold)"),
        ("profanity=block if sae/first>1", "steer (target)"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_part(text: str, field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse_intervention(text)
    assert raised.value.field == field


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.array(["a"]), np.array([1j]), np.float32(1)])
def test_a_file_that_holds_no_vector_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(InvalidRequestError, match="one vector of real numbers"):
        parse_intervention(f"direction:{tmp_path / 'wrong.npy'}@blocks.1.hook_resid_post=block")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("profanity>0.5=flag", Guard(PROFANITY, 0.5, GuardAction.FLAG)),
        ("profanity>-1=block@prompt", Guard(PROFANITY, -1.0, GuardAction.BLOCK, phase=Phase.PROMPT)),
        ("a>b=c/7>1e3=block", Guard(FeatureTarget("a>b=c", 7), 1000.0, GuardAction.BLOCK)),
        (
            "profanity>0.5=rewind:8 with profanity=clamp:-2x",
            Guard(PROFANITY, 0.5, GuardAction.REWIND, Rewind(8, (CLAMPED,))),
        ),
        (
            "profanity>0.5=rewind:3*2@generated with profanity=clamp:-2x; sae/4=block if profanity>0.1 else flag",
            Guard(
                PROFANITY,
                0.5,
                GuardAction.REWIND,
                Rewind(
                    3,
                    (CLAMPED, Intervention(FeatureTarget("sae", 4), Op.BLOCK, gate=Gate(PROFANITY, 0.1))),
                    max_retries=2,
                    otherwise=GuardAction.FLAG,
                ),
                phase=Phase.GENERATED,
            ),
        ),
    ],
)
def test_reading_a_guard(text: str, expected: Guard) -> None:
    assert parse_guard(text) == expected


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "guard"),
        ("profanity", "guard"),
        ("profanity=block", "guard"),
        (">1=block", "guard"),
        ("profanity>1", "guard"),
        ("profanity>1=block with profanity=block", "guard"),
        ("profanity>1=block:3", "guard"),
        ("profanity>1=rewind with profanity=block", "guard"),
        ("profanity>1=rewind:3", "guard"),
        ("profanity>1=rewind:x with profanity=block", "guard"),
        ("profanity>1=flag else block", "guard"),
        ("profanity>1=explode", "guard (action)"),
        ("profanity>=block", "guard (threshold)"),
        ("profanity>loud=block", "guard (threshold)"),
        ("profanity>1=block@never", "guard (phase)"),
        ("sae/first>1=block", "guard (target)"),
        ("profanity>1=rewind:3 with profanity=clamp:-1x; profanity=explode", "guard (edit 1) (operation)"),
        ("profanity>1=rewind:3 with profanity", "guard (edit 0)"),
        ("profanity>1=rewind:3 with profanity=block else explode", "guard (action)"),
        ("profanity>1=rewind:3 with profanity=block else rewind", "rewind.otherwise"),
        ("profanity>1=rewind:65 with profanity=block", "rewind.num_tokens"),
        ("profanity>1=rewind:3*5 with profanity=block", "rewind.max_retries"),
    ],
)
def test_a_guard_that_cannot_be_read_is_refused_with_its_part(text: str, field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse_guard(text)
    assert raised.value.field == field
    if field == "guard":
        assert "TARGET>NUMBER=ACTION" in raised.value.expected
