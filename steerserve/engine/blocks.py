"""The blocks of the KV cache, and the prefix cache that lives in them.

A block holds the keys and values of ``block_size`` consecutive positions. A full block may be registered
under a key that names everything its content depends on; from then on it is never written again, and any
request whose prefix has that key may read it. A block that nobody holds keeps its content, and its
registration, until it is needed for something else.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

DIGEST_SIZE = 32


@dataclass(eq=False, slots=True)
class Block:
    """One block of the KV cache.

    Attributes:
        id: where it is in the cache tensors.
        ref_count: requests that hold it; 0 is free.
        key: what it is registered under, if it is.
        record: what the engine keeps with a registered block, for the requests that find it.
    """

    id: int
    ref_count: int = 0
    key: bytes | None = None
    record: object = None


class BlockPool:
    """All blocks: held by requests, or free. A free block is either empty or findable by its key."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = tuple(Block(i) for i in range(num_blocks))
        self._free = OrderedDict.fromkeys(self.blocks)  # in the order of their next use
        self._registered: dict[bytes, Block] = {}

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out, those with findable content included."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` positions."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[Block]:
        """Blocks to write to, each held once. Empty ones go first, then the least recently used content."""
        assert num_blocks <= self.num_free
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            if block.key is not None:
                del self._registered[block.key]
                block.key = block.record = None
            block.ref_count = 1
        return blocks

    def free(self, blocks: Sequence[Block]) -> None:
        """Let go of a request's blocks, given in the order of its positions.

        Later positions are of no use without the earlier ones: they are the first to lose their content.
        """
        for block in reversed(blocks):
            assert block.ref_count > 0
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block] = None
                if block.key is None:
                    self._free.move_to_end(block, last=False)

    def lookup(self, keys: Iterable[bytes]) -> list[Block]:
        """The blocks registered under the longest run of ``keys`` from the first one; not yet held."""
        found = []
        for key in keys:
            block = self._registered.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def touch(self, blocks: Iterable[Block]) -> None:
        """Hold blocks that ``lookup`` found, to read them."""
        for block in blocks:
            if block.ref_count == 0:
                del self._free[block]
            block.ref_count += 1

    def register(self, block: Block, key: bytes, record: object) -> None:
        """Make a full block findable, unless another one with the same content is already."""
        assert block.ref_count > 0
        assert block.key is None
        if key not in self._registered:
            self._registered[key] = block
            block.key, block.record = key, record

    def is_shared(self, block: Block) -> bool:
        """Others read it now or may find it: it must not be written."""
        return block.key is not None or block.ref_count > 1


class PrefixKeys:
    """The keys of one request's full blocks, hashed once each, as they are asked for.

    A block's key is the SHA-256 of the key before it, its tokens, and the edits of each of its positions:
    equal keys mean equal content, whichever of the positions were prompt or generated.

    Args:
        root: 32 bytes, a digest of all that the content of every block depends on, weights and cache salt included.
        token_ids: the request's own list, which may grow.
        edits: the request's own list of ``(first position, 32-byte digest)``, ascending: what is done to the
            positions from there to the next entry's; of entries at the same position the last counts.
            Position 0 must have one.
    """

    def __init__(
        self, root: bytes, token_ids: Sequence[int], edits: Sequence[tuple[int, bytes]], block_size: int
    ) -> None:
        assert len(root) == DIGEST_SIZE
        self._chain = [root]
        self._token_ids = token_ids
        self._edits = edits
        self._block_size = block_size

    def first(self, num_blocks: int) -> list[bytes]:
        """Keys of the first ``num_blocks`` blocks, all of whose tokens must be known."""
        while len(self._chain) <= num_blocks:
            start = (len(self._chain) - 1) * self._block_size
            self._chain.append(self._next_key(start, start + self._block_size))
        return self._chain[1 : num_blocks + 1]

    def truncate(self, num_tokens: int) -> None:
        """Forget the keys of blocks that reach beyond ``num_tokens``: their tokens or edits change."""
        del self._chain[num_tokens // self._block_size + 1 :]

    def _next_key(self, start: int, end: int) -> bytes:
        tokens = array("i", self._token_ids[start:end])
        assert len(tokens) == self._block_size
        edits = b"".join(
            digest * (min(following, end) - max(first, start))
            for (first, digest), (following, _) in pairwise([*self._edits, (end, b"")])
        )
        assert len(edits) == DIGEST_SIZE * self._block_size
        return sha256(self._chain[-1] + tokens.tobytes() + edits).digest()
