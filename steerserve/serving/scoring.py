"""How much texts that the server did not write show the loaded concepts: ``Score``, and moderation over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steerserve.errors import InvalidRequestError
from steerserve.serving.reading import TextReader, Watched
from steerserve.serving.service import Caller, Interface, Service
from steerserve.serving.text_rules import VERDICTS, TextRule, text_rules
from steerserve.steering.compiler import find_policies
from steerserve.types import (
    ConceptScore,
    Phase,
    ScoredToken,
    TextScores,
    TextVerdict,
    VerdictKind,
)

EVERY_SCORE = -1e38
"""A threshold that every score exceeds, so that every token is reported."""


class Scorer:
    """Scores texts by the detectors of the loaded concepts."""

    def __init__(self, service: Service) -> None:
        self._reader = TextReader(service)
        self._engine = service.engine_loop.engine
        packs = self._engine.catalog.packs.values()
        self._thresholds = {pack.name: pack.card.detector.threshold for pack in packs}

    async def score(
        self,
        text: str,
        concepts: Sequence[str],
        caller: Caller,
        interface: Interface,
        policies: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> TextScores:
        """Scores for each of ``concepts``, or all that are loaded if none is named, and what ``policies`` say to them.

        Args:
            policies: as name or name@version; the text is to them what a model answered.
            timeout_s: until the work ends with DEADLINE_EXCEEDED.

        Raises:
            InvalidRequestError: a concept or policy that is not loaded or is named twice.
            SteerserveError: as ``Service.generate``; also a score that is not finite.
        """
        asked = self._checked(concepts)
        catalog = self._engine.catalog  # the one in force now
        judges = find_policies(policies, catalog)
        rules = text_rules(judges, Phase.GENERATED, catalog, "policies")
        names = list(dict.fromkeys([*asked, *(rule.concept for rule in rules)]))
        watched = [Watched(name, EVERY_SCORE) for name in names]
        tokens: dict[str, dict[int, ScoredToken]] = {name: {} for name in names}
        reading = await self._reader.read(text, watched, caller, interface, timeout_s)
        for seen in reading.sightings:
            # Where windows overlap a token is read twice; what was read with more text in front of it came first.
            tokens[names[seen.watched]].setdefault(seen.start, ScoredToken(seen.start, seen.end, seen.score))
        in_order = {name: tuple(found[start] for start in sorted(found)) for name, found in tokens.items()}
        verdicts = [_verdict(rule, in_order[rule.concept]) for rule in rules]
        return TextScores(
            concepts={name: ConceptScore(name, self._thresholds[name], in_order[name]) for name in asked},
            verdicts=tuple(
                verdict
                for policy in judges
                for verdict in [each for each in verdicts if each.policy == policy.tag and each.tokens]
                or [TextVerdict(VerdictKind.ALLOW, policy.tag)]
            ),
            receipts=reading.receipts,
        )

    def _checked(self, concepts: Sequence[str]) -> list[str]:
        for index, name in enumerate(concepts):
            if name not in self._thresholds or name in concepts[:index]:
                known = ", ".join(sorted(self._thresholds)) or "none is loaded"
                raise InvalidRequestError(f"concepts[{index}]", name, f"a loaded concept, each once: {known}")
        return list(concepts) or sorted(self._thresholds)


def _verdict(rule: TextRule, tokens: Sequence[ScoredToken]) -> TextVerdict:
    limit = np.float32(rule.threshold)  # as the engine compares
    fired = tuple(token for token in tokens if token.score > limit)
    return TextVerdict(VERDICTS[rule.action], rule.policy.tag, rule.rule.label, rule.threshold, fired)
