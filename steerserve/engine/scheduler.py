"""Which tokens of which requests the next forward pass computes.

A running request holds a row of the batch and blocks for all tokens it has. Requests are served in the order
of (priority, arrival), best first:

- A request that needs one token, as every one does that generates, is in every step; what is left of the
  step's budgets goes to prompts, in chunks.
- Requests join in order. The first that does not fit holds up those behind it.
- A request that needs a block when none is free takes those of the worst running request, unless that is
  itself. One that waits does so only to requests of worse priority, for any lack.

A preempted request keeps its tokens and waits at its old place; its positions are computed again, or found in
the prefix cache.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Generic, NamedTuple, Protocol, TypeVar

from steerserve.engine.blocks import Block, BlockPool
from steerserve.errors import IncompatibleError


class Schedulable(Protocol):
    """What the scheduler sees of a request. It alone sets the last three, which start as ``0, [], None``.

    Attributes:
        priority: lower is served first; equals in the order of ``arrival``.
        num_tokens: prompt and response so far; the engine appends what it samples, and takes back in a rewind.
        max_cached: positions it may take from the prefix cache. The last token is never taken from there.
        entries_per_token: most steering entries that one of its tokens ever needs at one site.
        num_computed: leading positions whose keys and values stand.
        blocks: where they are, and room for the other tokens.
        row: its slot in the running batch; None while it waits.
    """

    @property
    def priority(self) -> int: ...
    @property
    def arrival(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def max_cached(self) -> int: ...
    @property
    def entries_per_token(self) -> int: ...

    num_computed: int
    blocks: list[Block]
    row: int | None

    def block_keys(self, num_blocks: int) -> Sequence[bytes]:
        """Keys of its first ``num_blocks`` blocks."""


S = TypeVar("S", bound=Schedulable)


class Chunk(NamedTuple, Generic[S]):
    """``num_tokens`` positions of one request, from ``start`` on."""

    sequence: S
    start: int
    num_tokens: int


@dataclass(eq=False)
class Step(Generic[S]):
    """One forward pass.

    Attributes:
        chunks: at most one a request. The first ``num_decodes`` are requests that ran before and need one
            token; their order changes only when one of them joins or leaves.
        preempted: requests that lost their row and blocks; to be looked at before ``admitted``.
        admitted: requests that got a row, with the blocks found in the prefix cache; a chunk may have to wait.
    """

    chunks: list[Chunk[S]] = field(default_factory=list)
    num_decodes: int = 0
    preempted: list[S] = field(default_factory=list)
    admitted: list[tuple[S, list[Block]]] = field(default_factory=list)


@dataclass
class _Budget:
    """What is left of a step: tokens, and steering entries at a site."""

    tokens: int
    entries: int

    def fits(self, sequence: Schedulable) -> int:
        """How many of the request's tokens fit."""
        num_tokens = min(self.tokens, sequence.num_tokens - sequence.num_computed)
        if sequence.entries_per_token:
            num_tokens = min(num_tokens, self.entries // sequence.entries_per_token)
        return num_tokens

    def take(self, sequence: S) -> Chunk[S]:
        """As many of its tokens as fit."""
        num_tokens = self.fits(sequence)
        self.tokens -= num_tokens
        self.entries -= num_tokens * sequence.entries_per_token
        return Chunk(sequence, sequence.num_computed, num_tokens)


class Scheduler(Generic[S]):
    """Waiting and running requests; not thread-safe.

    Each step: ``schedule``, the forward pass, ``advance`` for every chunk; then ``register`` for blocks that are
    full, at once or in a later step, ``truncate`` and ``remove`` as the new tokens demand.

    Args:
        max_num_seqs: rows of the batch.
        max_num_batched_tokens: tokens of a step: a bound on how long a prompt delays the next token of others.
        max_step_entries: steering entries of a step at any one site.
        max_model_len: most tokens of one request.

    Raises:
        IncompatibleError: a request could wait for ever within these limits.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_step_entries: int,
        max_model_len: int,
        prefix_caching: bool = True,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            expected = f"at least {max_num_seqs}, a token for each of max_num_seqs"
            raise IncompatibleError("engine.max_num_batched_tokens", max_num_batched_tokens, expected)
        if len(pool.blocks) < pool.num_blocks_for(max_model_len):
            expected = f"at least {pool.num_blocks_for(max_model_len)}, room for one request of max_model_len tokens"
            raise IncompatibleError("engine.num_blocks", len(pool.blocks), expected)
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_step_entries = max_step_entries
        self.prefix_caching = prefix_caching
        self._waiting: list[S] = []  # both lists are sorted, best first
        self._running: list[S] = []
        self._free_rows = list(range(max_num_seqs))

    @property
    def waiting(self) -> Sequence[S]:
        """Requests without a row, best first."""
        return self._waiting

    @property
    def running(self) -> Sequence[S]:
        """Requests with a row, best first."""
        return self._running

    def check_entries(self, entries_per_token: int) -> None:
        """Refuse a request that would never fit.

        Raises:
            IncompatibleError: one of its tokens needs more steering entries at a site than a step has.
        """
        if entries_per_token > self.max_step_entries:
            expected = f"at most {self.max_step_entries} features at one site"
            raise IncompatibleError("steering", entries_per_token, expected)

    def add(self, sequence: S) -> None:
        """Queue a request that ``check_entries`` let pass."""
        insort(self._waiting, sequence, key=_rank)

    def remove(self, sequence: S) -> None:
        """Forget a request, wherever it stands; its row and blocks are free at once."""
        if sequence.row is None:
            self._waiting.remove(sequence)
        else:
            self._release(sequence)

    def schedule(self) -> Step[S]:
        """Plan the next forward pass; it has chunks if any request is unfinished."""
        step = Step[S]()
        self._grow(step)
        while self._waiting and self._running and self._waiting[0].priority < self._running[-1].priority:
            if not self._make_way(self._waiting[0], step):
                break
            self._join(step)
        budget = _Budget(self.max_num_batched_tokens, self.max_step_entries)
        decodes, prefills = self._by_need()
        step.chunks = [budget.take(sequence) for sequence in decodes]
        step.num_decodes = len(decodes)
        step.chunks += [budget.take(sequence) for sequence in prefills if budget.fits(sequence)]
        while self._waiting and budget.fits(self._waiting[0]) and self._has_room(self._waiting[0], self._running):
            step.chunks.append(budget.take(self._join(step)))
        return step

    def advance(self, chunk: Chunk[S]) -> None:
        """Take note that a chunk was computed."""
        assert chunk.sequence.num_computed == chunk.start
        chunk.sequence.num_computed += chunk.num_tokens

    def register(self, sequence: S, block: int, record: object) -> None:
        """Make a running request's ``block``-th block, which is full, findable, with the engine's record of it."""
        self.pool.register(sequence.blocks[block], sequence.block_keys(block + 1)[block], record)

    def truncate(self, sequence: S, num_computed: int) -> None:
        """Forget a running request's positions from ``num_computed`` on, which are about to change.

        If the block in which they start is shared, its other positions are forgotten with them: computing
        up to a block of positions once more is cheaper to get right than a copy, and gives the same bits.
        """
        assert sequence.row is not None
        assert num_computed <= sequence.num_computed
        num_kept = num_computed // self.pool.block_size
        if num_computed % self.pool.block_size and not self.pool.is_shared(sequence.blocks[num_kept]):
            num_kept += 1
        self.pool.free(sequence.blocks[num_kept:])
        del sequence.blocks[num_kept:]
        sequence.num_computed = min(num_computed, num_kept * self.pool.block_size)

    def _grow(self, step: Step[S]) -> None:
        """Give running requests blocks for the tokens they have, best first, at the expense of the worst."""
        for sequence in tuple(self._running):
            while sequence.row is not None:
                num_missing = self.pool.num_blocks_for(sequence.num_tokens) - len(sequence.blocks)
                if num_missing <= self.pool.num_free:
                    sequence.blocks += self.pool.allocate(num_missing)
                    break
                self._preempt(self._running[-1], step)

    def _make_way(self, sequence: S, step: Step[S]) -> bool:
        """Preempt requests of worse priority, the worst first, until this one has room; none if all do not suffice."""
        num_staying = bisect_right(self._running, sequence.priority, key=lambda other: other.priority)
        if not self._has_room(sequence, self._running[:num_staying]):
            return False
        while not self._has_room(sequence, self._running):
            self._preempt(self._running[-1], step)
        return True

    def _has_room(self, sequence: S, staying: Sequence[S]) -> bool:
        """Whether a request that waits finds a row, entries and blocks if, of the running, the best ones stay."""
        if len(staying) == self.max_num_seqs:
            return False
        if sum(other.entries_per_token for other in staying) + sequence.entries_per_token > self.max_step_entries:
            return False
        given_up = Counter(block for other in self._running[len(staying) :] for block in other.blocks)
        num_free = self.pool.num_free + sum(block.ref_count == count for block, count in given_up.items())
        num_held = sum(block.ref_count > given_up[block] for block in self._cached_prefix(sequence))
        return self.pool.num_blocks_for(sequence.num_tokens) - num_held <= num_free

    def _cached_prefix(self, sequence: S) -> list[Block]:
        if not self.prefix_caching:
            return []
        num_positions = min(sequence.max_cached, sequence.num_tokens - 1)
        return self.pool.lookup(sequence.block_keys(num_positions // self.pool.block_size))

    def _join(self, step: Step[S]) -> S:
        """Start the first waiting request, which must have room."""
        sequence = self._waiting.pop(0)
        cached = self._cached_prefix(sequence)
        self.pool.touch(cached)
        num_missing = self.pool.num_blocks_for(sequence.num_tokens) - len(cached)
        sequence.blocks = cached + self.pool.allocate(num_missing)
        sequence.num_computed = len(cached) * self.pool.block_size
        sequence.row = heappop(self._free_rows)
        insort(self._running, sequence, key=_rank)
        step.admitted.append((sequence, cached))
        return sequence

    def _preempt(self, sequence: S, step: Step[S]) -> None:
        self._release(sequence)
        insort(self._waiting, sequence, key=_rank)
        step.preempted.append(sequence)

    def _release(self, sequence: S) -> None:
        """Take a running request's row and blocks."""
        assert sequence.row is not None
        self._running.remove(sequence)
        heappush(self._free_rows, sequence.row)
        self.pool.free(sequence.blocks)
        sequence.blocks, sequence.num_computed, sequence.row = [], 0, None

    def _by_need(self) -> tuple[list[S], list[S]]:
        """Running requests that need one token, and those that need more."""
        needs = [(sequence, sequence.num_tokens - sequence.num_computed) for sequence in self._running]
        assert all(num_tokens > 0 for _, num_tokens in needs)
        decodes = [sequence for sequence, num_tokens in needs if num_tokens == 1]
        return decodes, [sequence for sequence, num_tokens in needs if num_tokens > 1]


def _rank(sequence: Schedulable) -> tuple[int, int]:
    return sequence.priority, sequence.arrival
