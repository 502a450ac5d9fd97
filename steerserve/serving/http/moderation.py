"""``POST /v1/moderations``: the loaded concepts are the categories.

A category's score is 1 / (1 + exp(threshold − s)), s being the concept's largest score at any token and the threshold
its card's: detectors are logistic regressions, so that 0.5 is the threshold, above which a category is flagged. It is
no calibrated probability; ``steerserve`` has the scores themselves.
"""

from __future__ import annotations

import math
import uuid
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from steerserve.serving.http.backend import Backend
from steerserve.serving.http.bodies import ModerationBody, parse_body
from steerserve.serving.http.connection import read_json_body, unless_disconnected
from steerserve.serving.scoring import Scorer
from steerserve.serving.service import Caller, Interface
from steerserve.types import ConceptScore, TextScores

_CLIENT_CLOSED_REQUEST = 499


class Moderation:
    """Judges texts by every loaded concept."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._scorer = Scorer(backend.service)

    async def answer(self, request: Request) -> Response:
        try:
            caller = self._backend.authenticate(request)
            content = await read_json_body(request, self._backend.max_body_bytes, self._backend.read_timeout_s)
            body = parse_body(ModerationBody, content)
            self._backend.check_model(body.model)
            results = await unless_disconnected(request.receive, self._results(body.texts, caller))
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        moderation_id = f"modr-{uuid.uuid4().hex}"
        answer = {"id": moderation_id, "model": self._backend.model_name, "results": results}
        return JSONResponse(answer, headers={"x-request-id": moderation_id})

    async def _results(self, texts: list[str], caller: Caller) -> list[dict[str, Any]]:
        return [_result(await self._scorer.score(text, (), caller, Interface.HTTP)) for text in texts]


def _result(read: TextScores) -> dict[str, Any]:
    scores = read.concepts.values()
    categories = {score.concept: score.flagged for score in scores}
    return {
        "flagged": read.flagged,
        "categories": categories,
        "category_scores": {score.concept: _share(score) for score in scores},
        "category_applied_input_types": {concept: ["text"] for concept in categories},
        "steerserve": {score.concept: _report(score) for score in scores},
    }


def _report(score: ConceptScore) -> dict[str, Any]:
    largest = score.largest
    return {
        "score": None if largest is None else largest.score,
        "threshold": score.threshold,
        "characters": None if largest is None else [largest.start, largest.end],
    }


def _share(score: ConceptScore) -> float:
    """Into [0, 1], the threshold at 0.5."""
    largest = score.largest
    return 0.0 if largest is None else 0.5 + 0.5 * math.tanh((largest.score - score.threshold) / 2)
