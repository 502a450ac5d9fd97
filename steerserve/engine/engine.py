"""The request loop: admission, one model step for every running request, outputs.

``step`` reads as the architecture. Requests join and leave between steps; each owns a row of the KV
cache, its features in the bank, and its private state in ``Sequence``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence as Items

import torch

from steerserve.config import EngineConfig
from steerserve.engine.detokenizer import Detokenizer
from steerserve.engine.feature_bank import FeatureBank
from steerserve.engine.prompts import encode_prompt
from steerserve.engine.runner import ModelRunner
from steerserve.engine.sampler import DrawnToken, check_token_ids, next_tokens
from steerserve.engine.sequence import Sequence
from steerserve.engine.steering_log import SteeringLog
from steerserve.errors import CapacityError, DetectorError, IncompatibleError, InvalidRequestError, SteerserveError
from steerserve.models.loading import LoadedModel
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan
from steerserve.types import FinishReason, GenerateRequest, PositionScores, StepOutput, TokenLogprobs

GUARD_FAILED = "a policy could not read its activation: not finite, or pushed beyond its SAE's norm by the request"


class Engine:
    """Serves many requests at once, each with its own steering.

    ``add_request``, ``abort`` and ``has_unfinished`` may be called from any thread; ``step`` from one.
    """

    def __init__(self, model: LoadedModel, catalog: Catalog, config: EngineConfig) -> None:
        if config.max_model_len > model.max_context:
            expected = f"at most {model.max_context}, the context of {model.name}"
            raise IncompatibleError("engine.max_model_len", config.max_model_len, expected)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.model = model
        self.catalog = catalog
        self.config = config
        self._runner = ModelRunner(model, config.max_num_seqs, config.max_model_len)
        self._bank = FeatureBank(config.bank_capacity, model.d_model)
        self._running: list[Sequence] = []
        self._decode_log: SteeringLog | None = None
        self._lock = threading.Lock()  # guards the three below and the bank's bookkeeping
        self._waiting: deque[Sequence] = deque()
        self._unfinished: set[str] = set()
        self._aborted: set[str] = set()

    def add_request(self, request: GenerateRequest) -> None:
        """Check and queue a request; nothing is queued if this raises.

        Raises:
            InvalidRequestError: the request is wrong; the error names the field.
            IncompatibleError: its steering does not fit the model.
            CapacityError: the queue or the feature bank is full.
        """
        prompt = encode_prompt(request, self.model, self.config.max_model_len)
        check_token_ids(request.sampling, self.model.vocab_size)
        plan = compile_plan(request.steering, request.policies, self.catalog)
        detokenizer = Detokenizer(self.model.tokenizer, prompt)
        with self._lock:
            if request.request_id in self._unfinished:
                raise InvalidRequestError("request_id", request.request_id, "an id that no unfinished request has")
            if len(self._waiting) >= self.config.max_waiting:
                raise CapacityError(f"the queue is full: {self.config.max_waiting} requests are waiting")
            slots = self._bank.acquire(plan)
            self._waiting.append(Sequence.create(request, prompt, plan, slots, detokenizer))
            self._unfinished.add(request.request_id)

    def abort(self, request_id: str) -> None:
        """End a request at the next step, which returns its last output; unknown ids are ignored."""
        with self._lock:
            if request_id in self._unfinished:
                self._aborted.add(request_id)

    def close(self) -> None:
        """Take the hooks off the model; the engine is not to be used afterwards."""
        self._runner.close()

    def has_unfinished(self) -> bool:
        """Some request waits for ``step``."""
        with self._lock:
            return bool(self._unfinished)

    @property
    def num_running(self) -> int:
        """Requests that hold a row of the KV cache."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def step(self) -> list[StepOutput]:
        """One model step; at most one output for each request, the last of which ends it.

        Running requests advance before new ones join, so that a row freed here is used at once.
        """
        outputs = self._drop_aborted()
        outputs += self._decode()
        outputs += self._admit()
        return outputs

    def _drop_aborted(self) -> list[StepOutput]:
        with self._lock:
            aborted, self._aborted = self._aborted, set()
            queued = [sequence for sequence in self._waiting if sequence.request_id in aborted]
            for sequence in queued:
                self._waiting.remove(sequence)
        running = [sequence for sequence in self._running if sequence.request_id in aborted]
        self._leave(running)
        return [self._end(sequence, reason=FinishReason.ABORT) for sequence in queued + running]

    def _decode(self) -> list[StepOutput]:
        running = list(self._running)
        if not running:
            return []
        tokens = [sequence.last_token_id for sequence in running]
        positions = [sequence.next_position for sequence in running]
        try:
            log = self._open_decode_log()
            logits = self._runner.decode(tokens, positions, log.next_run())
        except Exception as error:
            # The pass is shared, so is its failure; the requests that wait must not suffer from it.
            self._leave(running)
            return [self._end(sequence, error=error) for sequence in running]
        return self._advance(running, logits, log, num_positions=1)

    def _admit(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        for _ in range(self.config.max_prefills_per_step):
            with self._lock:
                if not self._waiting or len(self._running) == self.config.max_num_seqs:
                    break
                sequence = self._waiting.popleft()
            outputs += self._prefill(sequence)
        return outputs

    def _prefill(self, sequence: Sequence) -> list[StepOutput]:
        self._join(sequence)
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        try:
            log = SteeringLog.for_prefill(sequence.prompt_entries, sequence.tally, self._bank, len(prompt))
            logits = self._runner.prefill(prompt, len(self._running) - 1, log.next_run())
        except Exception as error:
            self._leave([sequence])
            return [self._end(sequence, error=error)]
        outputs = self._advance([sequence], logits, log, num_positions=len(prompt))
        log.flush()
        return outputs

    def _advance(
        self, sequences: Items[Sequence], logits: torch.Tensor, log: SteeringLog, num_positions: int
    ) -> list[StepOutput]:
        """Give every sequence the token its logits ``[n, vocab]`` call for; end those that are done or broken.

        Args:
            num_positions: the last tokens of every sequence, which the pass has just fed.
        """
        failed = _failures(sequences, logits, log.rows_with_failed_guard())
        scores = [
            log.last_scores(row, sequence.plan, len(sequence.token_ids) - num_positions, num_positions)
            if sequence.request.return_activations
            else ()
            for row, sequence in enumerate(sequences)
        ]
        sound = [row for row in range(len(sequences)) if row not in failed]
        drawn = next_tokens(logits[sound] if failed else logits, [sequences[row].sampler for row in sound])
        tokens = dict(zip(sound, drawn, strict=True))
        texts = {row: sequences[row].append(tokens[row].token_id, self.model.eos_token_ids) for row in sound}
        done = [
            sequence for row, sequence in enumerate(sequences) if row in failed or sequence.finish_reason is not None
        ]
        if done:
            log.flush()
            self._leave(done)
        return [
            self._end(sequence, error=failed[row], scores=scores[row])
            if row in failed
            else self._emit(sequence, tokens[row], texts[row], scores[row])
            for row, sequence in enumerate(sequences)
        ]

    def _emit(self, sequence: Sequence, token: DrawnToken, text: str, scores: tuple[PositionScores, ...]) -> StepOutput:
        if sequence.finish_reason is None:
            return StepOutput(
                request_id=sequence.request_id,
                token_ids=(token.token_id,),
                text=text,
                scores=scores,
                logprobs=token.logprobs,
                num_prompt_tokens=sequence.num_prompt_tokens,
            )
        return self._end(
            sequence,
            reason=sequence.finish_reason,
            token_ids=(token.token_id,),
            text=text,
            scores=scores,
            logprobs=token.logprobs,
        )

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason | None = None,
        error: Exception | None = None,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        scores: tuple[PositionScores, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> StepOutput:
        """Forget a sequence that holds no row any more; its last output."""
        with self._lock:
            self._bank.release(sequence.plan)
            self._unfinished.discard(sequence.request_id)
            self._aborted.discard(sequence.request_id)
        return StepOutput(
            request_id=sequence.request_id,
            token_ids=token_ids,
            text=text + sequence.rest_of_text(),
            scores=scores,
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=sequence.stop_reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            receipt=sequence.tally.receipt(self.model.fingerprint),
            error=error,
        )

    def _join(self, sequence: Sequence) -> None:
        """Take the next row."""
        self._close_decode_log()
        self._running.append(sequence)

    def _leave(self, sequences: Items[Sequence]) -> None:
        """Free rows and bring the tallies of all running sequences up to date."""
        if sequences:
            self._close_decode_log()
        for sequence in sequences:
            row, last = self._running.index(sequence), len(self._running) - 1
            self._runner.kv_cache.free_row(row, last)
            self._running[row] = self._running[last]
            self._running.pop()

    def _open_decode_log(self) -> SteeringLog:
        """The log of the rows as they are; built anew after they changed."""
        if self._decode_log is None:
            entries = [sequence.generated_entries for sequence in self._running]
            tallies = [sequence.tally for sequence in self._running]
            self._decode_log = SteeringLog.for_decode(entries, tallies, self._bank)
        return self._decode_log

    def _close_decode_log(self) -> None:
        """The rows are about to change: the log built for them is read a last time."""
        if self._decode_log is not None:
            self._decode_log.flush()
            self._decode_log = None


def _failures(sequences: Items[Sequence], logits: torch.Tensor, guard_failed: set[int]) -> dict[int, Exception]:
    """Why a row must not go on, by row."""
    finite = logits.amax(dim=-1).isfinite().tolist()
    failed: dict[int, Exception] = {}
    for row, sequence in enumerate(sequences):
        if row in guard_failed:
            failed[row] = DetectorError(f"{GUARD_FAILED}: {', '.join(sequence.plan.policies)}")
        elif not finite[row] and sequence.request.steering.interventions:
            expected = "edits that leave the model's output finite"
            failed[row] = InvalidRequestError("steering.interventions", "non-finite logits", expected)
        elif not finite[row]:
            failed[row] = SteerserveError("the model's logits are not finite")
    return failed
