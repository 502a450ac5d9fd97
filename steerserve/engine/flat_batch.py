"""The tokens of one step, side by side, whatever requests they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from steerserve.engine.entries import Entries
from steerserve.engine.scheduler import Chunk
from steerserve.engine.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Piece:
    """``count`` consecutive positions of one request from ``start`` on, all with the same entries."""

    sequence: Sequence
    entries: Entries
    start: int
    count: int

    @property
    def end(self) -> int:
        """The position behind it."""
        return self.start + self.count

    @property
    def is_decoding(self) -> bool:
        """One token behind all that was read, as in every step of a response."""
        return self.count == 1 and 0 < self.start == self.sequence.num_read


@dataclass
class FlatBatch:
    """A step's pieces, those of decoding requests in front, and its tokens in their order.

    Attributes:
        drawing: the requests whose last token is among them, and which go on.
        logits_at: for each of them, where that token is.
    """

    pieces: list[Piece]
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    drawing: list[Sequence] = field(default_factory=list)
    logits_at: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, chunks: Iterable[Chunk[Sequence]]) -> FlatBatch:
        """The batch of what the scheduler chose."""
        pieces = [
            Piece(chunk.sequence, entries, start, count)
            for chunk in chunks
            for entries, start, count in chunk.sequence.pieces(chunk.start, chunk.num_tokens)
        ]
        batch = cls(sorted(pieces, key=lambda piece: not piece.is_decoding))
        for piece in batch.pieces:
            batch._append(piece)
        return batch

    def _append(self, piece: Piece) -> None:
        sequence = piece.sequence
        assert sequence.row is not None
        self.token_ids += sequence.token_ids[piece.start : piece.end]
        self.positions += range(piece.start, piece.end)
        self.rows += [sequence.row] * piece.count
        if piece.end == sequence.num_tokens and sequence.finish_reason is None:
            self.drawing.append(sequence)
            self.logits_at.append(len(self.token_ids) - 1)
