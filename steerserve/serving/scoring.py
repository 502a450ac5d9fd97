"""How much texts that the server did not write show the loaded concepts: ``Score``, and moderation over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from steerserve.errors import InvalidRequestError
from steerserve.serving.reading import TextReader, Watched
from steerserve.serving.service import Caller, Interface, Service
from steerserve.types import ConceptScore, ScoredToken

EVERY_SCORE = -1e38
"""A threshold that every score exceeds, so that every token is reported."""


class Scorer:
    """Scores texts by the detectors of the loaded concepts."""

    def __init__(self, service: Service) -> None:
        self._reader = TextReader(service)
        packs = service.engine_loop.engine.catalog.packs.values()
        self._thresholds = {pack.name: pack.card.detector.threshold for pack in packs}

    async def score(
        self, text: str, concepts: Sequence[str], caller: Caller, interface: Interface
    ) -> list[ConceptScore]:
        """One score for each of ``concepts``, or of all that are loaded if none is named.

        Raises:
            InvalidRequestError: a concept that is not loaded or is named twice.
            SteerserveError: as ``Service.generate``; also a score that is not finite.
        """
        names = self._checked(concepts)
        watched = [Watched(name, EVERY_SCORE) for name in names]
        tokens: list[dict[int, ScoredToken]] = [{} for _ in names]
        for seen in await self._reader.read(text, watched, caller, interface):
            # Where windows overlap a token is read twice; what was read with more text in front of it came first.
            tokens[seen.watched].setdefault(seen.start, ScoredToken(seen.start, seen.end, seen.score))
        return [
            ConceptScore(name, self._thresholds[name], tuple(found[start] for start in sorted(found)))
            for name, found in zip(names, tokens, strict=True)
        ]

    def _checked(self, concepts: Sequence[str]) -> list[str]:
        for index, name in enumerate(concepts):
            if name not in self._thresholds or name in concepts[:index]:
                known = ", ".join(sorted(self._thresholds)) or "none is loaded"
                raise InvalidRequestError(f"concepts[{index}]", name, f"a loaded concept, each once: {known}")
        return list(concepts) or sorted(self._thresholds)
