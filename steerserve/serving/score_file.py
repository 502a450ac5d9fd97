"""Texts of a JSONL file, scored; for ``steerserve score --file``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steerserve.errors import InvalidRequestError
from steerserve.types import ScoredToken, TextScores

AT_ONCE = 8
"""Texts that are under way at the same time: the server reads them together."""


class TextLine(BaseModel):
    """A line of the file; its other fields come back as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    text: str = Field(min_length=1)


def read_lines(path: Path) -> list[TextLine]:
    """Read JSON lines of ``{"text": ...}``.

    Raises:
        InvalidRequestError: the file is missing or empty, or a line is no such object; names the line.
    """
    try:
        numbered = [(number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError("--file", str(path), f"a file of JSON lines ({error})") from error
    if not numbered:
        raise InvalidRequestError("--file", str(path), "at least one line")
    lines = []
    for number, line in numbered:
        try:
            lines.append(TextLine.model_validate_json(line))
        except ValidationError as error:
            expected = f'{{"text": "..."}}, not empty ({error.errors()[0]["msg"]})'
            raise InvalidRequestError(f"{path}:{number}", line, expected) from None
    return lines


def score_lines(lines: Sequence[TextLine], score: Callable[[str], TextScores]) -> Iterator[TextScores]:
    """What ``score``, called in several threads, says of each line, in their order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(lambda line: score(line.text), lines)


def as_json(line: TextLine, read: TextScores) -> dict[str, Any]:
    """The line with what was read in it."""
    return line.model_dump() | {
        "flagged": read.flagged,
        "scores": {
            name: {
                "score": None if score.largest is None else score.largest.score,
                "threshold": score.threshold,
                "flagged": score.flagged,
                "characters": None if score.largest is None else _characters(score.largest),
            }
            for name, score in read.concepts.items()
        },
        "verdicts": [
            {
                "policy": verdict.policy,
                "verdict": str(verdict.kind),
                "rule": verdict.rule,
                "characters": [_characters(token) for token in verdict.tokens],
            }
            for verdict in read.verdicts
        ],
    }


def _characters(token: ScoredToken) -> list[int]:
    return [token.start, token.end]
