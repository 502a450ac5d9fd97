"""Scores of texts: wire messages to plain types and back."""

from __future__ import annotations

from collections.abc import Iterable

from steerserve.serving.fields import expect, refuse_too_many, refuse_unknown_fields
from steerserve.types import ConceptScore, ScoredToken
from steerserve.v1 import score_pb2 as pb

MAX_CONCEPTS = 4096


def check_score_request(message: pb.ScoreRequest) -> None:
    """Refuse what no loaded model is needed to see.

    Raises:
        InvalidRequestError: an empty text, unknown fields, or too many concepts.
    """
    refuse_too_many(len(message.concepts), "concepts", MAX_CONCEPTS)
    refuse_unknown_fields(message)
    expect(message.text != "", "text", message.text, "at least one character")


def scores_to_proto(scores: Iterable[ConceptScore], return_tokens: bool) -> pb.ScoreResponse:
    """Write the scores of one text."""
    entries = [_to_proto(score, return_tokens) for score in scores]
    return pb.ScoreResponse(scores=entries, flagged=any(entry.flagged for entry in entries))


def scores_from_proto(message: pb.ScoreResponse) -> dict[str, ConceptScore]:
    """Read them, by concept; ``tokens`` is the largest one alone where they were not asked for."""
    return {entry.concept: _from_proto(entry) for entry in message.scores}


def _to_proto(score: ConceptScore, return_tokens: bool) -> pb.ConceptScore:
    largest = score.largest
    return pb.ConceptScore(
        concept=score.concept,
        score=None if largest is None else largest.score,
        threshold=score.threshold,
        flagged=score.flagged,
        largest=None if largest is None else _token(largest),
        tokens=[_token(token) for token in score.tokens] if return_tokens else [],
    )


def _from_proto(entry: pb.ConceptScore) -> ConceptScore:
    tokens = entry.tokens or ([entry.largest] if entry.HasField("largest") else [])
    return ConceptScore(
        entry.concept, entry.threshold, tuple(ScoredToken(token.start, token.end, token.score) for token in tokens)
    )


def _token(token: ScoredToken) -> pb.TokenScore:
    return pb.TokenScore(start=token.start, end=token.end, score=token.score)
