"""What the kernel read and did in each step: judged at once, counted in bulk, kept for the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from steerserve.engine.blocks import Block
from steerserve.engine.entries import Entries
from steerserve.engine.flat_batch import Piece
from steerserve.engine.guards import Judgement, detector_failed, judge
from steerserve.engine.records import Record, empty_record
from steerserve.engine.sequence import BlockRecord
from steerserve.engine.sequence import Sequence as Response
from steerserve.engine.steering_log import DecodeLog
from steerserve.engine.step_tables import StepTables


class Readings:
    """Reads a step's results off the tables.

    Decoding requests are written to a log line by line, as long as they are the same; everything else is read
    piece by piece. Every position is read once, however often it is computed.

    Args:
        on_read: called with a response some of whose positions have been counted and kept.
    """

    def __init__(self, tables: StepTables, on_read: Callable[[Response], None]) -> None:
        self._tables = tables
        self._on_read = on_read
        self._log: DecodeLog | None = None
        self._rows: list[tuple[Response, Entries]] = []

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Have the tables and the log ready for a step."""
        rows = [(piece.sequence, piece.entries) for piece in pieces if piece.is_decoding]
        if rows != self._rows:
            self.close_log()
            self._log, self._rows = DecodeLog([entries for _, entries in rows]), rows
        self._tables.prepare([(piece.entries, piece.count) for piece in pieces])

    def read(self, pieces: Sequence[Piece]) -> dict[Response, Judgement]:
        """Take what the step that has just run left; what keeps responses from going on."""
        judged: dict[Response, Judgement] = {}
        num_decoding = len(self._rows)
        if num_decoding:
            self._read_line(pieces[:num_decoding], judged)
        for index, piece in enumerate(pieces[num_decoding:], start=num_decoding):
            if piece.sequence not in judged:
                self._note(piece, self._read_piece(piece, self._tables.record(index)), judged)
        for sequence in dict.fromkeys(piece.sequence for piece in pieces[num_decoding:]):
            self._on_read(sequence)
        return judged

    def replay(self, sequence: Response, cached: Sequence[Block], block_size: int) -> Judgement | None:
        """Read what the kernel left when the positions of cached blocks were computed, as if it ran now."""
        # Positions that were read before may since stand in a block of another response, cut into other pieces.
        num_known = sequence.num_read // block_size
        for index, block in enumerate(cached[num_known:], start=num_known):
            records = iter(cast("BlockRecord", block.record))
            for entries, start, count in sequence.pieces(index * block_size, block_size):
                record = next(records) if entries.at else empty_record(count, entries.num_scores)
                judgement = self._read_piece(Piece(sequence, entries, start, count), record)
                if judgement is not None:
                    return judgement
        return None

    def logs(self, sequence: Response) -> bool:
        """Some of the response's positions may be in the log, not counted yet."""
        return any(logged is sequence for logged, _ in self._rows)

    def close_log(self) -> None:
        """The decoding requests are about to change: the log built for them is read a last time."""
        self._read_log()
        self._log, self._rows = None, []

    def _read_line(self, decoding: Sequence[Piece], judged: dict[Response, Judgement]) -> None:
        log = self._log
        assert log is not None
        log.append(self._tables)
        failed = log.rows_with_failed_detector()
        for row, piece in enumerate(decoding):
            sequence = piece.sequence
            sequence.num_read = piece.end
            if sequence.reports_scores:
                record = log.record(row, first_line=log.num_lines - 1)
                sequence.add_scores(piece.start, record.intervention_scores(piece.entries, sequence.num_interventions))
            if row in failed:
                judged[sequence] = detector_failed(sequence, piece.start)
            elif piece.entries.guards:
                self._note(piece, judge(sequence, piece.entries, piece.start, self._tables.score(row)), judged)
        if log.is_full:
            self._read_log()

    def _read_piece(self, piece: Piece, record: Record) -> Judgement | None:
        """Count, keep and judge the positions that were not read before."""
        sequence, entries = piece.sequence, piece.entries
        known = min(max(sequence.num_read - piece.start, 0), piece.count)
        if known == piece.count:
            return None
        start, record = piece.start + known, record.part(known, piece.count)
        sequence.num_read = piece.end
        sequence.keep(start, entries, record)
        judgement = self._judge(sequence, entries, start, record)
        if judgement is not None:
            # Positions behind the one that decides count for nothing: how many a pass read depends on its size.
            record = record.part(0, judgement.position + 1 - start)
        record.add_to(sequence.tally, entries)
        if sequence.reports_scores:
            sequence.add_scores(start, record.intervention_scores(entries, sequence.num_interventions))
        return judgement

    @staticmethod
    def _judge(sequence: Response, entries: Entries, start: int, record: Record) -> Judgement | None:
        """The first decision that keeps the response from going on, whatever detector it comes from."""
        failed = record.first_failure(entries, start)
        if failed is None:
            return judge(sequence, entries, start, record.score)
        judgement = judge(sequence, entries, start, record.score[:failed])
        return judgement or detector_failed(sequence, start + failed)

    def _read_log(self) -> None:
        """Count the lines of the log, and keep them."""
        log = self._log
        if log is None or log.num_lines == 0:
            return
        for row, (sequence, entries) in enumerate(self._rows):
            if entries.at:
                sequence.keep(sequence.num_read - log.num_lines, entries, log.record(row))
        log.flush([sequence.tally for sequence, _ in self._rows])
        for sequence, _ in self._rows:
            self._on_read(sequence)

    @staticmethod
    def _note(piece: Piece, judgement: Judgement | None, judged: dict[Response, Judgement]) -> None:
        if judgement is not None:
            judged[piece.sequence] = judgement
