"""One response while the engine holds it: its tokens, where they stand in the cache, and what is not yet released."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

from steerserve.engine.blocks import Block, PrefixKeys
from steerserve.engine.detokenizer import Detokenizer, StopStrings
from steerserve.engine.entries import Entries, PlanEntries, most_entries
from steerserve.engine.receipt import Tally
from steerserve.engine.records import Record, joined
from steerserve.engine.redaction import Redactor, WaitingToken
from steerserve.engine.sampler import DrawnToken, RowSampler
from steerserve.types import (
    REDACTED_TOKEN_ID,
    FinishReason,
    FloatArray,
    GenerateRequest,
    GuardEvent,
    Phase,
    PositionScores,
    Receipt,
    StopReason,
    TokenLogprobs,
)

BlockRecord = tuple[Record, ...]
"""The records of a block's positions, one for each piece of it that asks for something."""


@dataclass(frozen=True)
class HeldToken:
    """A token that the client has not got, the text that became certain with it, and how to take it back."""

    token_id: int
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    text_state: tuple[Any, Any] | None
    own_text: str = ""
    """What the token itself adds; ``text`` may be another part, as stop strings are held back."""


class Sequence:
    """A response's tokens, plan and private state.

    Attributes:
        token_ids: prompt, then response.
        num_layers: those that must run for it: of a reading, up to the last place where it is read.
        num_computed: positions whose keys and values stand in the cache.
        num_read: positions whose scores and counts have been taken; what is computed again is not read again.
        blocks, row: the cache blocks of its positions and its line in the block table, while it runs.
        num_blocks_placed: of its blocks, those whose ids stand in the block table.
        num_blocks_cached: of its blocks, those that were offered to the prefix cache or taken from it.
        entries_per_token: most steering entries that one of its tokens ever needs at one site.
        held: tokens that are not released, the last ones of ``token_ids``.
        redacted: positions whose tokens the client must not see.
        finish_reason, stop_reason: why the response ends with its last token, once it does.
        num_to_launch: the request's other responses, which begin when its prompt is computed.
        is_cacheable: its blocks may be offered to the prefix cache and taken from it.
    """

    def __init__(
        self,
        request: GenerateRequest,
        index: int,
        prompt: Items[int],
        entries: PlanEntries,
        detokenizer: Detokenizer,
        num_layers: int,
        root_key: bytes,
        block_size: int,
        arrival: int,
        deadline: float | None,
        is_cacheable: bool,
    ) -> None:
        self.request = request
        self.index = index
        self.arrival = arrival
        self.deadline = deadline
        self.plan = entries.plan
        self.entries = entries
        self.num_layers = num_layers
        self.root_key = root_key
        self.is_cacheable = is_cacheable
        self.num_to_launch = 0
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.num_computed = self.num_read = self.num_cached_tokens = 0
        self.blocks: list[Block] = []
        self.row: int | None = None
        self.num_blocks_placed = self.num_blocks_cached = 0
        self.entries_per_token = most_entries(entries.plan)
        self.tally = Tally(entries.plan)
        self.detokenizer = detokenizer
        self.stop_strings = StopStrings(request.sampling.stop, request.sampling.include_stop_str_in_output)
        self.sampler = RowSampler(request.sampling, prompt, index)
        self.held: deque[HeldToken] = deque()
        self.finish_reason: FinishReason | None = FinishReason.LENGTH if request.is_reading else None
        self.stop_reason: StopReason | None = None
        self.guard_events: list[GuardEvent] = []
        self.redacted: set[int] = set()
        self.num_redacted_tokens = 0
        self._redactor = Redactor() if entries.plan.redacts else None
        self.num_rewinds = self.num_rewound_tokens = 0
        self._spans: list[tuple[int, Entries]] = []
        self._digests: list[tuple[int, bytes]] = []
        self._add_spans(0)
        self._block_size = block_size
        self._keys = PrefixKeys(root_key, self.token_ids, self._digests, block_size)
        self._history: list[tuple[int, Entries, Record]] = []
        self._scores: deque[PositionScores] = deque()
        self._num_scores_taken = 0

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def priority(self) -> int:
        """Lower is served first."""
        return self.request.priority

    @property
    def num_tokens(self) -> int:
        """Length of prompt and response so far."""
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Length of the response so far, tokens included that may be taken back."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_cached(self) -> int:
        """The last token is always computed: the next one is drawn from its logits."""
        return self.num_tokens - 1 if self.is_cacheable else 0

    @property
    def reads_last_token(self) -> bool:
        """The last token is fed to the model too, for the sake of what is read there."""
        return bool(self.plan.guards) or self.reports_scores or self.request.is_reading

    @property
    def reports_scores(self) -> bool:
        """The client wants the score of every intervention and monitor at every position."""
        return self.request.return_activations and self.num_interventions > 0

    @property
    def num_interventions(self) -> int:
        """Interventions of its plan, monitors included."""
        return len(self.plan.interventions)

    @property
    def is_complete(self) -> bool:
        """No more tokens follow, and none waits to be read."""
        waits = self.reads_last_token and self.num_computed < self.num_tokens
        return self.finish_reason is not None and not waits

    # Where its positions stand, and what is in force there.

    def block_keys(self, num_blocks: int) -> list[bytes]:
        """Keys of its first ``num_blocks`` blocks, all of them full."""
        return self._keys.first(num_blocks)

    def pieces(self, start: int, count: int) -> Iterator[tuple[Entries, int, int]]:
        """Positions ``start`` to ``start + count``, cut where what is in force changes: it, the first, how many."""
        end = start + count
        for index, (begin, entries) in enumerate(self._spans):
            limit = self._spans[index + 1][0] if index + 1 < len(self._spans) else end
            first, last = max(start, begin), min(end, limit)
            if first < last:
                yield entries, first, last - first

    def keep(self, start: int, entries: Entries, record: Record) -> None:
        """Remember what the kernel left at positions from ``start``, for the blocks they will fill."""
        if entries.at and self.is_cacheable:
            self._history.append((start, entries, record))

    def block_record(self, index: int) -> BlockRecord | None:
        """What the kernel left at the positions of a full block; None if some of it is not known any more."""
        end = (index + 1) * self._block_size
        records = []
        for entries, start, count in self.pieces(end - self._block_size, self._block_size):
            if not entries.at:
                continue
            parts = [
                record.part(max(start - first, 0), start + count - first)
                for first, of, record in self._history
                if of is entries and first < start + count and first + len(record.score) > start
            ]
            if sum(len(part.score) for part in parts) != count:
                return None
            records.append(joined(parts))
        self._history = [item for item in self._history if item[0] + len(item[2].score) > end]
        return tuple(records)

    # Its tokens.

    def append(self, drawn: DrawnToken, eos_token_ids: frozenset[int]) -> None:
        """Take the token that was drawn; see whether the response ends with it."""
        state = (self.detokenizer.snapshot(), self.stop_strings.snapshot()) if len(self.plan.levels) > 1 else None
        token_id = drawn.token_id
        self.token_ids.append(token_id)
        self.sampler.count(token_id)
        self._end_at_token(token_id, eos_token_ids)
        hidden = self.finish_reason is FinishReason.STOP and not self.request.sampling.include_stop_str_in_output
        own_text = "" if hidden else self.detokenizer.push(token_id)
        text = self.stop_strings.push(own_text)
        if self.finish_reason is not None:
            rest = self.detokenizer.finish()
            own_text += rest
            text += self.stop_strings.push(rest) + self.stop_strings.finish()
        if self.stop_strings.matched is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self.stop_strings.matched
        self.held.append(HeldToken(token_id, text, drawn.logprobs, state, own_text))

    def release(self) -> list[HeldToken]:
        """The tokens that can no longer be taken back, oldest first."""
        num_settled = len(self.held)
        if self.plan.hold_back and not self.is_complete:
            num_settled -= max(self.num_tokens + self.plan.hold_back - self.num_computed - 1, 0)
        if self._redactor is not None:
            return self._release_redacted(self._redactor, max(num_settled, 0))
        return [self.held.popleft() for _ in range(num_settled)]

    def _release_redacted(self, redactor: Redactor, num_settled: int) -> list[HeldToken]:
        """Those of the ``num_settled`` that can not be taken back whose words are closed."""
        first = self.num_tokens - len(self.held)
        settled = [
            WaitingToken(token.own_text, len(token.text), position in self.redacted)
            for position, token in enumerate(itertools.islice(self.held, num_settled), start=first)
        ]
        shown = redactor.release(settled, num_settled if self.is_complete else redactor.num_closed(settled))
        self.num_redacted_tokens += sum(token.is_withheld for token in shown)
        released = [self.held.popleft() for _ in shown]
        return [
            _withheld(token, text) if is_withheld else replace(token, text=text)
            for token, (text, is_withheld) in zip(released, shown, strict=True)
        ]

    def rewind(self, num_tokens: int) -> None:
        """Take the response back to ``num_tokens`` in all; the position before is to be computed again."""
        taken = [self.held.pop() for _ in range(self.num_tokens - num_tokens)]
        del self.token_ids[num_tokens:]
        self.sampler.rewind([token.token_id for token in reversed(taken)])
        before = taken[-1].text_state
        assert before is not None
        text_state, stop_state = before
        self.detokenizer.restore(text_state)
        self.stop_strings.restore(stop_state)
        self.finish_reason = self.stop_reason = None
        self.redacted = {position for position in self.redacted if position < num_tokens}
        self.num_rewinds += 1
        self.num_rewound_tokens += len(taken)
        self.num_read = num_tokens - 1
        self._spans = [span for span in self._spans if span[0] < self.num_read]
        self._add_spans(self.num_read)
        self._keys.truncate(self.num_read)
        self._history = [
            (start, entries, record.part(0, self.num_read - start))
            for start, entries, record in self._history
            if start < self.num_read
        ]
        while self._scores and self._scores[-1].position >= self.num_read:
            self._scores.pop()

    def last_text(self) -> str:
        """Text that no token released: none while tokens are held that the client must not see."""
        return "" if self.plan.guards else self._rest_of_text()

    # What was read.

    def add_scores(self, start: int, scored: FloatArray) -> None:
        """Scores ``[n, interventions]`` of the positions from ``start``."""
        first = self.plan.num_monitors
        self._scores.extend(
            PositionScores(start + index, line[first:], line[:first]) for index, line in enumerate(scored)
        )

    def take_scores(self, num_judged: int) -> tuple[PositionScores, ...]:
        """The scores of positions whose tokens may go out now that the first ``num_judged`` passed; each once."""
        limit = num_judged if num_judged == self.num_tokens else num_judged - max(self.plan.hold_back - 1, 0)
        taken = []
        while self._scores and self._scores[0].position < limit:
            scores = self._scores.popleft()
            if scores.position >= self._num_scores_taken:
                taken.append(scores)
                self._num_scores_taken = scores.position + 1
        return tuple(taken)

    def receipt(self, model_fingerprint: str) -> Receipt:
        """The proof so far."""
        receipt = self.tally.receipt(
            model_fingerprint, self.num_rewinds, self.num_rewound_tokens, self.num_cached_tokens
        )
        return replace(receipt, num_redacted_tokens=self.num_redacted_tokens)

    def _rest_of_text(self) -> str:
        """What is left when no token follows: text held back, and bytes that make no character as U+FFFD."""
        return self.stop_strings.push(self.detokenizer.finish()) + self.stop_strings.finish()

    def _add_spans(self, start: int) -> None:
        """What is in force from ``start`` on, at the level of the rewinds so far."""
        level = self.num_rewinds
        prompt, generated = (self.entries.in_force(level, phase) for phase in (Phase.PROMPT, Phase.GENERATED))
        spans = [(0, self.entries.in_force(level, Phase.PROMPT, at_start=True))] if start == 0 else []
        if max(start, 1) < self.num_prompt_tokens:
            spans.append((max(start, 1), prompt))
        for begin, entries in [*spans, (max(start, self.num_prompt_tokens), generated)]:
            # Cut only where the digest changes: requests that share a block must cut its records alike.
            if not self._spans or self._spans[-1][1].digest != entries.digest:
                self._spans.append((begin, entries))
        self._digests[:] = [(begin, entries.digest) for begin, entries in self._spans]

    def _end_at_token(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        sampling = self.request.sampling
        if token_id in eos_token_ids and not sampling.ignore_eos:
            self.finish_reason = FinishReason.STOP
        elif token_id in sampling.stop_token_ids:
            self.finish_reason, self.stop_reason = FinishReason.STOP, token_id
        elif self.num_generated_tokens >= sampling.max_tokens:
            self.finish_reason = FinishReason.LENGTH


def _withheld(token: HeldToken, text: str) -> HeldToken:
    """A token of a redacted word, as its client gets it."""
    told_nothing = tuple(TokenLogprobs(0.0, 0, ()) for _ in token.logprobs)
    return replace(token, token_id=REDACTED_TOKEN_ID, text=text, logprobs=told_nothing)
