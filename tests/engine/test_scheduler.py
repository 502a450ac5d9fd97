"""The scheduler against a model that remembers, at every place of the cache, what was written there.

``Simulation`` plays the engine and the model. Every property holds at every step of every trace; the tests
differ in the traces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from steerserve.engine.blocks import Block, BlockPool, PrefixKeys
from steerserve.engine.scheduler import Chunk, Scheduler, Step
from steerserve.errors import IncompatibleError

BLOCK_SIZE = 4
MAX_MODEL_LEN = 32
ROOT = bytes(32)


def digest(name: object) -> bytes:
    return sha256(repr(name).encode()).digest()


@dataclass(eq=False)
class Request:
    """``steering`` names what is done to its positions, of prompt and response, before any rewind."""

    arrival: int
    prompt: list[int]
    max_tokens: int = 1
    priority: int = 0
    entries_per_token: int = 0
    steering: tuple[int, int] = (0, 0)
    max_cached: int = MAX_MODEL_LEN
    num_computed: int = 0
    blocks: list[Block] = field(default_factory=list)
    row: int | None = None
    num_rewinds: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt)
        self.edits = [(0, digest(self.steering[0])), (len(self.prompt), digest(self.steering[1]))]
        self.keys = PrefixKeys(ROOT, self.token_ids, self.edits, BLOCK_SIZE)
        self.next_position = 0  # what the simulation expects to be computed next
        self.num_registered = 0  # blocks

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def num_missing_blocks(self) -> int:
        return -(-self.num_tokens // BLOCK_SIZE) - len(self.blocks)

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.arrival

    def block_keys(self, num_blocks: int) -> list[bytes]:
        return self.keys.first(num_blocks)

    def edit(self, position: int) -> int:
        return [int.from_bytes(edit[:4]) for start, edit in self.edits if start <= position][-1]

    def contents(self) -> list[int]:
        """What the model computes at every position: a fingerprint of all tokens and edits up to it."""
        contents = [0]
        for position, token in enumerate(self.token_ids):
            contents.append(hash((contents[-1], token, self.edit(position))))
        return contents[1:]

    def sample(self, content: int) -> None:
        """Append the token that follows from what is at the last position; few different ones, so that texts meet."""
        self.token_ids.append(hash((content, self.edit(self.num_tokens))) % 2)


class Simulation:
    def __init__(self, num_blocks: int = 32, **config: object) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.config = {
            "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_step_entries": 100,
            "max_model_len": MAX_MODEL_LEN, "prefix_caching": True,
        } | config  # fmt: skip
        self.scheduler: Scheduler[Request] = Scheduler(self.pool, **self.config)
        self.memory = [[0] * BLOCK_SIZE for _ in range(num_blocks)]
        self.content_of_key: dict[bytes, list[int]] = {}
        self.unfinished: list[Request] = []
        self.prefilled: list[Request] = []
        self.num_arrived = self.num_advanced = self.num_preempted = self.num_hits = self.num_shared_truncations = 0

    def add(self, prompt: list[int], **kwargs: object) -> Request:
        request = Request(self.num_arrived, prompt, **kwargs)
        self.num_arrived += 1
        self.scheduler.check_entries(request.entries_per_token)
        self.scheduler.add(request)
        self.unfinished.append(request)
        return request

    def remove(self, request: Request) -> None:
        self.scheduler.remove(request)
        self.unfinished.remove(request)
        assert (request.row, request.blocks) == (None, [])
        assert request not in [*self.scheduler.waiting, *self.scheduler.running]

    @property
    def rewindable(self) -> list[Request]:
        """Requests that have just got a token."""
        running = self.scheduler.running
        return [r for r in running if r.num_uncomputed == 1 and r.num_tokens > len(r.prompt)]

    def rewind(self, request: Request, num_tokens: int) -> None:
        """Take generated tokens back; what follows is steered differently and sampled anew."""
        kept = max(len(request.prompt), request.num_tokens - num_tokens)
        request.num_rewinds += 1
        del request.token_ids[kept:]
        request.edits[:] = [span for span in request.edits if span[0] < kept] + [(kept, digest(request.num_rewinds))]
        request.keys.truncate(kept)
        self.scheduler.truncate(request, kept - 1)
        lost = kept - 1 - request.num_computed
        assert 0 <= lost < BLOCK_SIZE
        self.num_shared_truncations += lost > 0
        request.next_position = request.num_computed
        request.num_registered = min(request.num_registered, request.num_computed // BLOCK_SIZE)

    def step(self) -> Step[Request]:
        running, num_free = list(self.scheduler.running), self.pool.num_free
        decodes = [request for request in running if request.num_uncomputed == 1]
        num_missing = sum(request.num_missing_blocks for request in running)
        step = self.scheduler.schedule()
        self.check_pool()
        self.check_budgets(step)
        self.check_order(step, running, needed_blocks=num_missing > num_free)
        self.check_decodes(step, decodes)
        self.check_nothing_is_left_undone(step)
        for request in step.preempted:
            request.next_position = 0
        for request, cached in step.admitted:
            self.check_cached(request, cached)
        for chunk in step.chunks:
            self.compute(chunk)
        for chunk in step.chunks:
            self.finish(chunk)
        self.num_preempted += len(step.preempted)
        return step

    def compute(self, chunk: Chunk[Request]) -> None:
        """Read everything before the chunk, write the chunk."""
        request, contents = chunk.sequence, chunk.sequence.contents()
        assert chunk.start == request.next_position == request.num_computed
        assert chunk.num_tokens > 0
        for position, content in enumerate(contents[: chunk.start + chunk.num_tokens]):
            block = request.blocks[position // BLOCK_SIZE]
            if position >= chunk.start:
                assert not self.pool.is_shared(block)
                self.memory[block.id][position % BLOCK_SIZE] = content
            assert self.memory[block.id][position % BLOCK_SIZE] == content
        request.next_position += chunk.num_tokens

    def finish(self, chunk: Chunk[Request]) -> None:
        request = chunk.sequence
        self.scheduler.advance(chunk)
        assert request.num_computed == request.next_position <= request.num_tokens
        self.num_advanced += 1
        if self.config["prefix_caching"] and self.num_advanced % 3:  # some are registered late
            self.register(request)
        if request.num_uncomputed == 0:
            position = request.num_tokens - 1
            request.sample(self.memory[request.blocks[position // BLOCK_SIZE].id][position % BLOCK_SIZE])
            if request.num_tokens == len(request.prompt) + 1:
                self.prefilled.append(request)
            if request.num_tokens == len(request.prompt) + request.max_tokens:
                self.remove(request)

    def register(self, request: Request) -> None:
        for i in range(request.num_registered, request.num_computed // BLOCK_SIZE):
            content = list(self.memory[request.blocks[i].id])
            assert self.content_of_key.setdefault(request.block_keys(i + 1)[i], content) == content
            self.scheduler.register(request, i, content)
        request.num_registered = request.num_computed // BLOCK_SIZE

    def drain(self) -> None:
        """Run to the end. The best running request computes something in each step and never loses it again."""
        for _ in range(sum(len(request.prompt) + request.max_tokens for request in self.unfinished)):
            if self.unfinished:
                self.step()
        assert self.unfinished == []
        assert len(self.scheduler.waiting) == len(self.scheduler.running) == 0
        assert self.pool.num_free == len(self.pool.blocks)

    def check_pool(self) -> None:
        """No block is lost or held by a stranger; what can be found is what its key says."""
        held = [block for request in self.unfinished for block in request.blocks]
        for block in self.pool.blocks:
            assert block.ref_count == held.count(block)
            if block.key is not None:
                assert self.memory[block.id] == block.record == self.content_of_key[block.key]
        assert self.pool.num_free == sum(block.ref_count == 0 for block in self.pool.blocks)
        rows = [request.row for request in self.scheduler.running]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(self.config["max_num_seqs"]))
        assert all((r.row, r.blocks, r.num_computed) == (None, [], 0) for r in self.scheduler.waiting)
        assert {*self.scheduler.waiting, *self.scheduler.running} == set(self.unfinished)

    def check_budgets(self, step: Step[Request]) -> None:
        assert sum(chunk.num_tokens for chunk in step.chunks) <= self.config["max_num_batched_tokens"]
        assert self.num_entries(step) <= self.config["max_step_entries"]
        assert len({chunk.sequence for chunk in step.chunks}) == len(step.chunks)
        assert {chunk.sequence for chunk in step.chunks} <= set(self.scheduler.running)

    def check_order(self, step: Step[Request], ran_before: list[Request], needed_blocks: bool) -> None:
        """Nobody overtakes; nobody is preempted for the sake of a worse one, or for nothing."""
        waiting, running = self.scheduler.waiting, self.scheduler.running
        admitted = [request for request, _ in step.admitted]
        assert list(waiting) == sorted(waiting, key=lambda request: request.rank)
        assert [request.rank for request in admitted] == sorted(request.rank for request in admitted)
        assert all(request.rank < waiting[0].rank for request in admitted if waiting)
        stayed = [request for request in ran_before if request not in step.preempted]
        for preempted in step.preempted:
            assert preempted in ran_before
            assert all(request.rank < preempted.rank for request in stayed)
            assert needed_blocks or any(request.priority < preempted.priority for request in admitted)
        assert not waiting or waiting[0].priority >= running[0].priority

    def check_decodes(self, step: Step[Request], decodes: list[Request]) -> None:
        """A request that needs one token gets it, unless it is preempted; these lead the batch, best first."""
        leading = [chunk.sequence for chunk in step.chunks[: step.num_decodes]]
        assert [request for request in decodes if request not in step.preempted] == [
            request for request in leading if request in decodes
        ]
        assert all(chunk.num_tokens == 1 for chunk in step.chunks[: step.num_decodes])
        assert [request.rank for request in leading] == sorted(request.rank for request in leading)

    def check_nothing_is_left_undone(self, step: Step[Request]) -> None:
        """The best running request goes on; others stand still only for lack of something."""
        tokens_left = self.config["max_num_batched_tokens"] - sum(chunk.num_tokens for chunk in step.chunks)
        entries_left = self.config["max_step_entries"] - self.num_entries(step)
        running, waiting = self.scheduler.running, self.scheduler.waiting
        planned = {chunk.sequence: chunk.num_tokens for chunk in step.chunks}
        assert not self.unfinished or running[0] in planned
        for request in running:
            if planned.get(request, 0) < request.num_uncomputed:
                assert tokens_left == 0 or entries_left < request.entries_per_token
        if waiting and tokens_left and entries_left >= waiting[0].entries_per_token:
            entries = sum(request.entries_per_token for request in (*running, waiting[0]))
            no_row = len(running) == self.config["max_num_seqs"]
            no_entries = entries > self.config["max_step_entries"]
            assert no_row or no_entries or waiting[0].num_missing_blocks > self.pool.num_free

    def check_cached(self, request: Request, cached: list[Block]) -> None:
        """A hit is the longest there is, holds what the request would compute, and leaves its last token to do."""
        contents, num_cached = request.contents(), len(cached) * BLOCK_SIZE
        limit = min(request.max_cached, request.num_tokens - 1) if self.config["prefix_caching"] else 0
        assert request.blocks[: len(cached)] == cached
        assert [content for block in cached for content in block.record] == contents[:num_cached]
        assert request.num_computed == num_cached <= limit
        if num_cached + BLOCK_SIZE <= limit:
            known = [self.memory[block.id] for block in self.pool.blocks if block.key is not None]
            assert contents[num_cached : num_cached + BLOCK_SIZE] not in known
        request.next_position, request.num_registered = num_cached, len(cached)
        self.num_hits += len(cached)

    def num_entries(self, step: Step[Request]) -> int:
        return sum(chunk.num_tokens * chunk.sequence.entries_per_token for chunk in step.chunks)


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, aborts and rewinds in a cache that is too small; at the end everyone is served."""

    @initialize(
        num_blocks=st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 16),
        max_num_seqs=st.integers(1, 4),
        spare_tokens=st.integers(0, 8),
        max_step_entries=st.integers(3, 12),
        prefix_caching=st.sampled_from([True, True, False]),
    )
    def start(self, num_blocks: int, max_num_seqs: int, spare_tokens: int, **config: object) -> None:
        config |= {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_seqs + spare_tokens}
        self.simulation = Simulation(num_blocks, **config)

    @rule(
        prompt=st.builds(lambda token, n: [token] * n, st.integers(0, 1), st.integers(1, 20)),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 2),
        entries_per_token=st.integers(0, 3),
        steering=st.tuples(st.integers(0, 1), st.integers(0, 1)),
        max_cached=st.sampled_from([MAX_MODEL_LEN, MAX_MODEL_LEN, 9, 0]),
    )
    def add(self, prompt: list[int], **kwargs: object) -> None:
        self.simulation.add(prompt, **kwargs)

    @rule(n=st.integers(1, 6))
    def step(self, n: int) -> None:
        for _ in range(n):
            self.simulation.step()

    @precondition(lambda self: self.simulation.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.remove(data.draw(st.sampled_from(self.simulation.unfinished)))

    @precondition(lambda self: self.simulation.rewindable)
    @rule(data=st.data(), num_tokens=st.integers(1, 12))
    def rewind(self, data: st.DataObject, num_tokens: int) -> None:
        self.simulation.rewind(data.draw(st.sampled_from(self.simulation.rewindable)), num_tokens)

    @invariant()
    def pool_is_sound(self) -> None:
        self.simulation.check_pool()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


TestTraces = SchedulerMachine.TestCase
TestTraces.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestManyTraces(SchedulerMachine.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("seed", range(20))
def test_overload(seed: int) -> None:
    """Many more requests than fit, of few different texts, with rewinds and aborts throughout."""
    random = Random(seed)
    simulation = Simulation(10, max_num_seqs=4, max_num_batched_tokens=10, max_step_entries=8)
    while simulation.num_arrived < 60:
        if random.random() < 0.3:
            simulation.add(
                [random.randrange(2)] * random.randint(1, 18),
                max_tokens=random.randint(1, 14),
                priority=random.choice([0, 1, 1, 1, 2]),
                entries_per_token=random.choice([0, 0, 1, 4]),
                steering=(random.choice([0, 0, 1]), random.choice([0, 0, 1])),
            )
        simulation.step()
        if random.random() < 0.1 and simulation.rewindable:
            simulation.rewind(random.choice(simulation.rewindable), random.randint(1, 6))
        if random.random() < 0.02 and simulation.unfinished:
            simulation.remove(random.choice(simulation.unfinished))
    simulation.drain()
    assert simulation.num_preempted > 5
    assert simulation.num_hits > 20
    assert simulation.num_shared_truncations > 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_prompts_of_equal_priority_are_done_in_the_order_of_arrival(prefix_caching: bool) -> None:
    random = Random(0)
    simulation = Simulation(200, max_num_seqs=8, prefix_caching=prefix_caching)
    requests = []
    for _ in range(50):
        requests.append(simulation.add([random.randrange(2)] * random.randint(1, 20), max_tokens=random.randint(1, 12)))
        if random.random() < 0.5:
            simulation.step()
    simulation.drain()
    assert simulation.prefilled == requests
    assert (simulation.num_hits > 0) is prefix_caching


def planned(step: Step[Request]) -> list[tuple[int, int, int]]:
    """(arrival, start, tokens) of each chunk."""
    return [(chunk.sequence.arrival, chunk.start, chunk.num_tokens) for chunk in step.chunks]


def test_a_long_prompt_takes_what_the_tokens_of_others_leave() -> None:
    simulation = Simulation(max_num_batched_tokens=6)
    simulation.add([0] * 3, max_tokens=9)
    simulation.add([1] * 9, max_tokens=9)
    simulation.add([2] * 4, max_tokens=9)
    assert planned(simulation.step()) == [(0, 0, 3), (1, 0, 3)]
    assert planned(simulation.step()) == [(0, 3, 1), (1, 3, 5)]
    assert planned(simulation.step()) == [(0, 4, 1), (1, 8, 1), (2, 0, 4)]
    assert planned(simulation.step()) == [(0, 5, 1), (1, 9, 1), (2, 4, 1)]


def test_a_chunk_shrinks_until_its_entries_fit() -> None:
    simulation = Simulation(max_step_entries=10)
    simulation.add([0] * 3, max_tokens=3, entries_per_token=2)
    simulation.add([1] * 9, max_tokens=3, entries_per_token=3)
    assert planned(simulation.step()) == [(0, 0, 3), (1, 0, 1)]
    assert planned(simulation.step()) == [(0, 3, 1), (1, 1, 2)]


def test_a_request_waits_until_a_token_of_everyone_that_runs_has_entries() -> None:
    simulation = Simulation(max_step_entries=10)
    simulation.add([0], max_tokens=3, entries_per_token=6)
    simulation.add([1], max_tokens=3, entries_per_token=5)
    simulation.add([2], max_tokens=3)
    assert [planned(simulation.step()) for _ in range(3)] == [[(0, 0, 1)], [(0, 1, 1)], [(0, 2, 1)]]
    assert planned(simulation.step()) == [(1, 0, 1), (2, 0, 1)]


def test_what_would_wait_for_ever_is_refused() -> None:
    Simulation(8, max_num_seqs=16, max_step_entries=10).scheduler.check_entries(10)
    with pytest.raises(IncompatibleError, match="steering: got 11, expected at most 10"):
        Simulation(max_step_entries=10).scheduler.check_entries(11)
    with pytest.raises(IncompatibleError, match=r"engine\.num_blocks: got 7, expected at least 8"):
        Simulation(7)
    with pytest.raises(IncompatibleError, match=r"engine\.max_num_batched_tokens: got 16, expected at least 17"):
        Simulation(max_num_seqs=17)


def test_only_a_better_priority_takes_the_row_of_a_running_request() -> None:
    """It takes one, the worst one's; the others go on."""
    simulation = Simulation(max_num_seqs=3)
    for priority in (1, 3, 2):
        simulation.add([0], max_tokens=9, priority=priority)
    simulation.step()
    equal = simulation.add([1], max_tokens=9, priority=3)
    assert simulation.step().preempted == []
    better = simulation.add([1], max_tokens=9, priority=0)
    step = simulation.step()
    assert [request.arrival for request in step.preempted] == [1]
    assert step.admitted == [(better, [])]
    assert [request.arrival for request in simulation.scheduler.waiting] == [1, equal.arrival]


def test_a_better_priority_takes_entries_too() -> None:
    simulation = Simulation(max_step_entries=10)
    worse = [simulation.add([0], max_tokens=9, priority=1, entries_per_token=5) for _ in range(2)]
    simulation.step()
    simulation.add([1] * 8, priority=0, entries_per_token=3)
    step = simulation.step()
    assert step.preempted == worse[1:]
    assert planned(step) == [(0, 1, 1), (2, 0, 1)]


@pytest.mark.parametrize("prompt", [[2] * 13, [1] * 13], ids=["not cached", "cached in what would be given up"])
def test_nobody_is_preempted_if_that_does_not_suffice(prompt: list[int]) -> None:
    """Of 8 blocks the best request holds 5, the worst 3."""
    simulation = Simulation(8, max_num_batched_tokens=64)
    simulation.add([0] * 17, max_tokens=4, priority=0)
    simulation.add([1] * 9, max_tokens=4, priority=2)
    simulation.step()
    assert simulation.pool.num_free == 0
    urgent = simulation.add(prompt, priority=1)
    step = simulation.step()
    assert (step.preempted, step.admitted) == ([], [])
    assert list(simulation.scheduler.waiting) == [urgent]


def test_blocks_that_others_hold_are_room_too() -> None:
    simulation = Simulation(8, max_num_batched_tokens=64)
    simulation.add([0] * 20, max_tokens=9)
    simulation.step()
    simulation.add([0] * 20, max_tokens=9)
    assert planned(simulation.step()) == [(0, 20, 1), (1, 16, 4)]


def test_a_preempted_request_finds_its_blocks_again() -> None:
    simulation = Simulation(8)
    first = simulation.add([0] * 8, max_tokens=13)
    second = simulation.add([1] * 8, max_tokens=13)
    while not (step := simulation.step()).preempted:
        assert len(planned(step)) == 2
    assert step.preempted == [second]
    assert (first.num_tokens, second.num_tokens) == (18, 17)
    while not (step := simulation.step()).admitted:
        assert len(planned(step)) == 1
    (again,) = step.admitted
    assert (again[0], len(again[1])) == (second, 3)
    simulation.drain()


def test_equal_prompts_share_all_full_blocks_but_the_last_token_is_computed() -> None:
    simulation = Simulation()
    simulation.add([0] * 8, max_tokens=9)
    simulation.step()
    simulation.add([0] * 8, max_tokens=9)
    simulation.add([0] * 9, max_tokens=9)
    simulation.add([0] * 9, max_tokens=9, max_cached=3)
    assert planned(simulation.step()) == [(0, 8, 1), (1, 4, 4), (2, 8, 1), (3, 0, 9)]
    assert simulation.pool.blocks[0].ref_count == 3


def test_differently_steered_prompts_share_nothing() -> None:
    simulation = Simulation()
    simulation.add([0] * 9, max_tokens=9)
    simulation.step()
    simulation.add([0] * 9, max_tokens=9, steering=(1, 0))
    assert planned(simulation.step()) == [(0, 9, 1), (1, 0, 9)]


@pytest.mark.parametrize(("num_tokens", "num_computed"), [(1, 9), (2, 8), (3, 4), (9, 4)])
def test_a_rewind_gives_a_shared_block_back(num_tokens: int, num_computed: int) -> None:
    """Positions 0 to 7 are in the prefix cache; 8 on are in a block of its own."""
    simulation = Simulation()
    request = simulation.add([0] * 6, max_tokens=20)
    while request.num_tokens < 11:
        simulation.step()
    simulation.rewind(request, num_tokens)
    assert request.num_computed == num_computed
    assert len(request.blocks) == -(-num_computed // BLOCK_SIZE)
    assert planned(simulation.step()) == [(0, num_computed, request.num_tokens - 1 - num_computed)]
    simulation.drain()


def test_an_aborted_request_is_gone_at_once() -> None:
    simulation = Simulation(max_num_seqs=1)
    running, waiting, last = (simulation.add([i] * 5, max_tokens=9) for i in range(3))
    simulation.step()
    simulation.remove(waiting)
    simulation.remove(running)
    assert simulation.pool.num_free == 32
    assert planned(simulation.step()) == [(last.arrival, 0, 5)]


def test_rows_that_stay_keep_their_places_in_the_batch() -> None:
    """They lead it in the same order while prompts join behind them, and while some that joined earlier leave."""
    simulation = Simulation(max_num_seqs=6, max_num_batched_tokens=12)
    early = [simulation.add([i], max_tokens=20) for i in range(3)]
    simulation.step()
    for i in range(15):
        simulation.add([i] * 7, max_tokens=2)
        assert [chunk.sequence for chunk in simulation.step().chunks[:3]] == early
    assert len(simulation.prefilled) > 10
