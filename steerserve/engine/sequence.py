"""One request while the engine holds it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from steerserve.engine.detokenizer import Detokenizer
from steerserve.engine.receipt import Tally
from steerserve.engine.steering_log import SiteEntries, entries_in_phase
from steerserve.steering.plan import IntArray, Plan
from steerserve.types import FinishReason, GenerateRequest, Phase


@dataclass(eq=False)
class Sequence:
    """A request's tokens, plan and private state.

    Attributes:
        token_ids: prompt, then response. All but the last response token have been fed to the model
            once the sequence runs.
        prompt_entries, generated_entries: its steering in the kernel's terms, by phase.
        rng: the request's own generator.
    """

    request: GenerateRequest
    token_ids: list[int]
    num_prompt_tokens: int
    plan: Plan
    prompt_entries: SiteEntries
    generated_entries: SiteEntries
    tally: Tally
    detokenizer: Detokenizer
    rng: np.random.Generator

    @classmethod
    def create(
        cls, request: GenerateRequest, prompt: Items[int], plan: Plan, slots: Items[IntArray], detokenizer: Detokenizer
    ) -> Sequence:
        """A sequence that waits for its prefill; ``slots`` as ``FeatureBank.acquire`` returned them."""
        return cls(
            request=request,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            plan=plan,
            prompt_entries=entries_in_phase(plan, slots, Phase.PROMPT),
            generated_entries=entries_in_phase(plan, slots, Phase.GENERATED),
            tally=Tally(plan),
            detokenizer=detokenizer,
            rng=np.random.Generator(np.random.PCG64(request.sampling.seed)),
        )

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def last_token_id(self) -> int:
        """The token that the next decode step feeds."""
        return self.token_ids[-1]

    @property
    def next_position(self) -> int:
        """Where the next decode step feeds it."""
        return len(self.token_ids) - 1

    @property
    def num_generated_tokens(self) -> int:
        """Length of the response so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def draw_uniform(self) -> float:
        """The number that picks the next token; greedy requests draw none."""
        return float(self.rng.random()) if self.request.sampling.temperature > 0 else 0.0

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the response ends with its last token, if it does."""
        sampling = self.request.sampling
        if self.last_token_id in eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_generated_tokens >= sampling.max_tokens else None
