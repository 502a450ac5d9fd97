"""One request while the engine holds it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from steerserve.engine.detokenizer import Detokenizer, StopStrings
from steerserve.engine.receipt import Tally
from steerserve.engine.sampler import RowSampler
from steerserve.engine.steering_log import SiteEntries, entries_in_phase
from steerserve.steering.plan import IntArray, Plan
from steerserve.types import FinishReason, GenerateRequest, Phase, StopReason


@dataclass(eq=False)
class Sequence:
    """A request's tokens, plan and private state.

    Attributes:
        token_ids: prompt, then response. All but the last response token have been fed to the model
            once the sequence runs.
        prompt_entries, generated_entries: its steering in the kernel's terms, by phase.
        finish_reason, stop_reason: why the response ends with its last token, once it does.
    """

    request: GenerateRequest
    token_ids: list[int]
    num_prompt_tokens: int
    plan: Plan
    prompt_entries: SiteEntries
    generated_entries: SiteEntries
    tally: Tally
    detokenizer: Detokenizer
    stop_strings: StopStrings
    sampler: RowSampler
    finish_reason: FinishReason | None = None
    stop_reason: StopReason | None = None

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
            stop_strings=StopStrings(request.sampling.stop, request.sampling.include_stop_str_in_output),
            sampler=RowSampler(request.sampling, prompt),
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

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> str:
        """Take the token that was drawn; the text that is now certain. Sees whether the response ends with it."""
        self.token_ids.append(token_id)
        self.sampler.count(token_id)
        self._end_at_token(token_id, eos_token_ids)
        hidden = self.finish_reason is FinishReason.STOP and not self.request.sampling.include_stop_str_in_output
        text = "" if hidden else self.stop_strings.push(self.detokenizer.push(token_id))
        if self.finish_reason is not None:
            text += self.rest_of_text()
        if self.stop_strings.matched is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self.stop_strings.matched
        return text

    def rest_of_text(self) -> str:
        """What is left when no token follows: text held back, and bytes that make no character as U+FFFD."""
        return self.stop_strings.push(self.detokenizer.finish()) + self.stop_strings.finish()

    def _end_at_token(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        sampling = self.request.sampling
        if token_id in eos_token_ids and not sampling.ignore_eos:
            self.finish_reason = FinishReason.STOP
        elif token_id in sampling.stop_token_ids:
            self.finish_reason, self.stop_reason = FinishReason.STOP, token_id
        elif self.num_generated_tokens >= sampling.max_tokens:
            self.finish_reason = FinishReason.LENGTH
