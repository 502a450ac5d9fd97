"""Scores of texts: wire messages to plain types and back."""

from __future__ import annotations

from collections.abc import Iterable

from steerserve.serving.convert_response import (
    VERDICT_KINDS,
    receipt_from_proto,
    receipt_to_proto,
    verdict_kind_to_proto,
)
from steerserve.serving.fields import expect, refuse_too_many, refuse_unknown_fields
from steerserve.types import ConceptScore, ScoredToken, TextScores, TextVerdict
from steerserve.v1 import score_pb2 as pb

MAX_NAMES = 4096
"""Of concepts, and of policies."""


def check_score_request(message: pb.ScoreRequest) -> None:
    """Refuse what no loaded model is needed to see.

    Raises:
        InvalidRequestError: an empty text, unknown fields, or too many concepts or policies.
    """
    refuse_too_many(len(message.concepts), "concepts", MAX_NAMES)
    refuse_too_many(len(message.policies), "policies", MAX_NAMES)
    refuse_unknown_fields(message)
    expect(message.text != "", "text", message.text, "at least one character")


def scores_to_proto(read: TextScores, return_tokens: bool) -> pb.ScoreResponse:
    """Write what was read in one text."""
    return pb.ScoreResponse(
        scores=[_to_proto(score, return_tokens) for score in read.concepts.values()],
        flagged=read.flagged,
        verdicts=[_verdict_to_proto(verdict) for verdict in read.verdicts],
        receipts=[receipt_to_proto(receipt) for receipt in read.receipts],
    )


def scores_from_proto(message: pb.ScoreResponse) -> TextScores:
    """Read it; ``ConceptScore.tokens`` is the largest one alone where they were not asked for."""
    return TextScores(
        concepts={entry.concept: _from_proto(entry) for entry in message.scores},
        verdicts=tuple(_verdict_from_proto(entry) for entry in message.verdicts),
        receipts=tuple(receipt_from_proto(entry) for entry in message.receipts),
    )


def _to_proto(score: ConceptScore, return_tokens: bool) -> pb.ConceptScore:
    largest = score.largest
    return pb.ConceptScore(
        concept=score.concept,
        score=None if largest is None else largest.score,
        threshold=score.threshold,
        flagged=score.flagged,
        largest=None if largest is None else _token(largest),
        tokens=_tokens(score.tokens) if return_tokens else [],
    )


def _from_proto(entry: pb.ConceptScore) -> ConceptScore:
    tokens = entry.tokens or ([entry.largest] if entry.HasField("largest") else [])
    return ConceptScore(entry.concept, entry.threshold, _scored(tokens))


def _verdict_to_proto(verdict: TextVerdict) -> pb.TextVerdict:
    return pb.TextVerdict(
        kind=verdict_kind_to_proto(verdict.kind),
        policy=verdict.policy,
        rule=verdict.rule,
        threshold=verdict.threshold,
        tokens=_tokens(verdict.tokens),
    )


def _verdict_from_proto(entry: pb.TextVerdict) -> TextVerdict:
    threshold = entry.threshold if entry.HasField("threshold") else None
    return TextVerdict(VERDICT_KINDS[entry.kind], entry.policy, entry.rule, threshold, _scored(entry.tokens))


def _tokens(tokens: Iterable[ScoredToken]) -> list[pb.TokenScore]:
    return [_token(token) for token in tokens]


def _scored(tokens: Iterable[pb.TokenScore]) -> tuple[ScoredToken, ...]:
    return tuple(ScoredToken(token.start, token.end, token.score) for token in tokens)


def _token(token: ScoredToken) -> pb.TokenScore:
    return pb.TokenScore(start=token.start, end=token.end, score=token.score)
