"""Blocks are in one state at a time, content is lost in the right order, and a key names all of it."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steerserve.engine.blocks import Block, BlockPool, PrefixKeys

BLOCK_SIZE = 4


def digest(name: object) -> bytes:
    return sha256(repr(name).encode()).digest()


def filled(pool: BlockPool, *names: str) -> list[Block]:
    """Blocks held and registered under names."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.register(block, digest(name), name)
    return blocks


def found(pool: BlockPool, *names: str) -> list[object]:
    return [block.record for block in pool.lookup(map(digest, names))]


def test_freed_content_can_be_found_until_its_block_is_used() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    pool.free(filled(pool, "a", "b"))
    assert pool.num_free == 2
    assert found(pool, "a", "b") == ["a", "b"]
    pool.allocate(2)
    assert found(pool, "a", "b") == []
    assert all(block.key is None and block.record is None for block in pool.blocks)


def test_a_lookup_ends_at_the_first_gap() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    filled(pool, "a", "c")
    assert found(pool, "a", "b", "c") == ["a"]
    assert found(pool, "b", "c") == []


def test_the_tail_of_a_sequence_is_lost_before_its_head() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    pool.free(filled(pool, "a", "b", "c"))
    pool.allocate(1)
    assert found(pool, "a", "b", "c") == ["a", "b"]
    pool.allocate(1)
    assert found(pool, "a", "b", "c") == ["a"]


def test_the_least_recently_used_content_is_lost_first() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    old, new, other = filled(pool, "old", "new", "other")
    for block in (old, new, other):
        pool.free([block])
    pool.touch([old])
    pool.free([old])
    pool.allocate(1)
    assert (found(pool, "old"), found(pool, "new"), found(pool, "other")) == (["old"], [], ["other"])


def test_empty_blocks_go_before_content() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    pool.free(filled(pool, "a"))
    pool.free(pool.allocate(2))
    pool.allocate(2)
    assert found(pool, "a") == ["a"]


def test_a_held_block_keeps_its_content() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    blocks = filled(pool, "a")
    pool.touch(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.allocate(1)
    assert found(pool, "a") == ["a"]


def test_the_first_of_equal_blocks_is_the_one_found() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    (first,) = filled(pool, "a")
    (second,) = pool.allocate(1)
    pool.register(second, digest("a"), "again")
    assert pool.lookup([digest("a")]) == [first]
    assert (first.record, second.record) == ("a", None)
    assert not pool.is_shared(second)


def test_a_block_is_shared_once_it_can_be_found_or_has_two_holders() -> None:
    pool = BlockPool(1, BLOCK_SIZE)
    (block,) = pool.allocate(1)
    assert not pool.is_shared(block)
    pool.touch([block])
    assert pool.is_shared(block)
    pool.free([block])
    pool.register(block, digest("a"), None)
    assert pool.is_shared(block)


def test_more_blocks_than_there_are_is_a_bug_of_the_caller() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.allocate(2)
    assert pool.num_free == 1


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_tokens(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(1, BLOCK_SIZE).num_blocks_for(num_tokens) == num_blocks


class PoolMachine(RuleBasedStateMachine):
    """Requests that hold runs of blocks, beside a model of what each block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, BLOCK_SIZE)
        self.held: list[list[Block]] = []
        self.content: dict[Block, str] = {}

    @rule(n=st.integers(1, 4))
    def allocate(self, n: int) -> None:
        if n <= self.pool.num_free:
            blocks = self.pool.allocate(n)
            assert len(set(blocks)) == n
            assert not any(block in run for run in self.held for block in blocks)
            for block in blocks:
                self.content.pop(block, None)
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=st.sampled_from("abc"))
    def register(self, data: st.DataObject, name: str) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.held))))
        if block.key is None:
            self.pool.register(block, digest(name), name)
            if name not in self.content.values():
                self.content[block] = name

    @rule(names=st.lists(st.sampled_from("abc"), max_size=3))
    def share(self, names: list[str]) -> None:
        blocks = self.pool.lookup(map(digest, names))
        where = {name: block for block, name in self.content.items()}
        known = [where.get(name) for name in names]
        assert blocks == known[: known.index(None) if None in known else None]
        self.pool.touch(blocks)
        if blocks:
            self.held.append(blocks)

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        for block in self.pool.blocks:
            holders = sum(run.count(block) for run in self.held)
            assert block.ref_count == holders
            name = self.content.get(block)
            assert (block.key, block.record) == ((digest(name), name) if name else (None, None))
            assert self.pool.is_shared(block) is (name is not None or holders > 1)
        assert self.pool.num_free == sum(block.ref_count == 0 for block in self.pool.blocks)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


# Few values and few positions, so that equal prefixes are common.
Request = tuple[int, list[tuple[int, int]]]
requests = st.tuples(st.integers(0, 1), st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=13))
"""A root, and token and edit of every position."""


def spans(edits: list[int]) -> list[tuple[int, bytes]]:
    """A span for every position: the longest way to say it."""
    return [(position, digest(edit)) for position, edit in enumerate(edits)]


def merged(edits: list[int]) -> list[tuple[int, bytes]]:
    """A span for every run of equal edits: the shortest way to say it."""
    return [span for i, span in enumerate(spans(edits)) if i == 0 or edits[i] != edits[i - 1]]


def keys_of(request: Request) -> list[bytes]:
    root, positions = request
    tokens, edits = [token for token, _ in positions], [edit for _, edit in positions]
    return PrefixKeys(digest(root), tokens, spans(edits), BLOCK_SIZE).first(len(tokens) // BLOCK_SIZE)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(a=requests, b=requests, common=st.integers(0, 13))
def test_keys_are_equal_exactly_where_everything_before_is(a: Request, b: Request, common: int) -> None:
    b = (b[0], a[1][:common] + b[1][common:])
    for i, (key_a, key_b) in enumerate(zip(keys_of(a), keys_of(b), strict=False)):
        end = (i + 1) * BLOCK_SIZE
        assert (key_a == key_b) is (a[0] == b[0] and a[1][:end] == b[1][:end])


def test_one_difference_anywhere_changes_the_keys_from_there_on() -> None:
    base: Request = (0, [(0, 0)] * 12)
    assert all(a != b for a, b in zip(keys_of(base), keys_of((1, base[1])), strict=True))
    for position in range(12):
        for changed in ((1, 0), (0, 1)):
            positions = [*base[1][:position], changed, *base[1][position + 1 :]]
            same = [a == b for a, b in zip(keys_of(base), keys_of((0, positions)), strict=True)]
            assert same == [i < position // BLOCK_SIZE for i in range(3)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(request=requests)
def test_how_the_edits_are_split_into_spans_does_not_matter(request: Request) -> None:
    root, positions = request
    tokens, edits = [token for token, _ in positions], [edit for _, edit in positions]
    keys = PrefixKeys(digest(root), tokens, merged(edits), BLOCK_SIZE)
    assert keys.first(len(tokens) // BLOCK_SIZE) == keys_of(request)


def test_of_spans_at_one_position_the_last_counts() -> None:
    tokens = [0] * 8
    retried = PrefixKeys(digest(0), tokens, [(0, digest(0)), (5, digest(1)), (5, digest(2))], BLOCK_SIZE)
    plain = PrefixKeys(digest(0), tokens, [(0, digest(0)), (5, digest(2))], BLOCK_SIZE)
    assert retried.first(2) == plain.first(2)


def test_an_edit_that_starts_later_does_not_reach_back() -> None:
    tokens = [0] * 8
    plain = PrefixKeys(digest(0), tokens, [(0, digest(0))], BLOCK_SIZE).first(2)
    steered = PrefixKeys(digest(0), tokens, [(0, digest(0)), (4, digest(1))], BLOCK_SIZE).first(2)
    assert (plain[0] == steered[0], plain[1] == steered[1]) == (True, False)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(before=requests, after=requests, kept=st.integers(0, 13))
def test_keys_follow_tokens_that_grow_and_are_taken_back(before: Request, after: Request, kept: int) -> None:
    tokens = [token for token, _ in before[1]]
    edits = spans([edit for _, edit in before[1]])
    keys = PrefixKeys(digest(0), tokens, edits, BLOCK_SIZE)
    for n in range(len(tokens) // BLOCK_SIZE + 1):
        assert keys.first(n) == keys_of((0, before[1]))[:n]
    kept = min(kept, len(tokens))
    keys.truncate(kept)
    positions = before[1][:kept] + after[1][kept:]
    tokens[kept:] = [token for token, _ in positions[kept:]]
    edits[kept:] = spans([edit for _, edit in positions])[kept:]
    assert keys.first(len(tokens) // BLOCK_SIZE) == keys_of((0, positions))


def test_a_key_needs_all_tokens_of_its_block_and_an_edit_at_each() -> None:
    with pytest.raises(AssertionError):
        PrefixKeys(digest(0), [0] * 7, [(0, digest(0))], BLOCK_SIZE).first(2)
    with pytest.raises(AssertionError):
        PrefixKeys(digest(0), [0] * 8, [(1, digest(0))], BLOCK_SIZE).first(1)
