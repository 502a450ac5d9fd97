"""The request loop: admission, one model step for every running request, outputs.

``step`` reads as the architecture. Requests join and leave between steps. The scheduler says which tokens of which
requests the step feeds; the tables turn their plans into the kernel's arguments; what the kernel leaves there is
judged by the guards and counted for the receipts before a token is drawn or released.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from hashlib import sha256

import torch

from steerserve.config import EngineConfig
from steerserve.engine.blocks import Block, BlockPool
from steerserve.engine.detokenizer import Detokenizer
from steerserve.engine.entries import PlanEntries, most_entries
from steerserve.engine.feature_bank import FeatureBank
from steerserve.engine.flat_batch import FlatBatch
from steerserve.engine.guards import Judgement, unproven
from steerserve.engine.prompts import encode_prompt
from steerserve.engine.readings import Readings
from steerserve.engine.runner import SCORES_PER_TOKEN, ModelRunner
from steerserve.engine.sampler import check_token_ids, next_tokens
from steerserve.engine.scheduler import Chunk, Scheduler
from steerserve.engine.sequence import Sequence
from steerserve.engine.step_tables import StepTables
from steerserve.engine.verdicts import verdicts_of
from steerserve.errors import (
    CapacityError,
    IncompatibleError,
    InvalidRequestError,
    PolicyError,
    ServiceError,
    SteerserveError,
)
from steerserve.models.loading import LoadedModel
from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan, find_policies
from steerserve.steering.limits import check_limits
from steerserve.steering.monitors import NO_MONITORS, Monitors
from steerserve.steering.packs import check_site, width_of
from steerserve.steering.plan import Plan
from steerserve.steering.policies import Policy
from steerserve.steering.policy_set import PolicyChanges, PolicySet
from steerserve.types import FinishReason, GenerateRequest, GuardAction, Site, SteeringSpec, StepOutput

NO_ROOM = "room for the features of all policies and monitors, which no request may take: {}"

MAX_SCORES = 2**24
"""That one request may have reported, at 4 bytes each."""


class Engine:
    """Serves many requests at once, each with its own steering.

    ``add_request``, ``abort`` and ``has_unfinished`` may be called from any thread; ``step`` from one.

    Attributes:
        sites: those that requests and policies can steer.
        monitors: what is read of every request besides.
        num_preemptions: how often a running response lost its place.
    """

    def __init__(
        self,
        model: LoadedModel,
        catalog: Catalog,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        monitors: Monitors = NO_MONITORS,
    ) -> None:
        if config.max_model_len > model.max_context:
            expected = f"at most {model.max_context}, the context of {model.name}"
            raise IncompatibleError("engine.max_model_len", config.max_model_len, expected)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.model = model
        self.catalog = catalog
        self.config = config
        self.monitors = monitors
        self._clock = clock
        self.sites = frozenset(_sites(model, catalog, config))
        self._runner = ModelRunner(model, config, sorted(self.sites | monitors.sites))
        self._bank = FeatureBank(config.bank_capacity, partial(width_of, model))
        splicer = self._runner.splicer
        self._readings = Readings(StepTables(splicer.buffers, splicer.scores, self._bank), self._cache_blocks)
        self._scheduler: Scheduler[Sequence] = Scheduler(
            BlockPool(config.num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_step_entries=config.max_step_entries,
            max_model_len=config.max_model_len,
            prefix_caching=config.enable_prefix_caching,
        )
        self._bare_plan = self._plan(SteeringSpec(), (), catalog)
        self._scheduler.check_entries(most_entries(self._bare_plan))
        plans = [self._policy_plan(policy) for policy in catalog.policies.values()]
        try:
            self._bank.pin([self._bare_plan, *(plan for plan in plans if plan is not None)])
        except (CapacityError, InvalidRequestError) as error:
            raise IncompatibleError("engine.bank_capacity", config.bank_capacity, NO_ROOM.format(error)) from error
        self.num_preemptions = 0
        self._num_arrivals = 0
        self._lock = threading.Lock()  # guards the three below and the bank's bookkeeping
        self._incoming: deque[Sequence] = deque()
        self._unfinished: dict[str, int] = {}  # responses that are still to end
        self._aborted: set[str] = set()

    def warm_up(self) -> float:
        """Run the model once, and compile it if it is to be, before the first request; seconds it took."""
        return self._runner.warm_up()

    def add_request(self, request: GenerateRequest) -> None:
        """Check and queue a request; nothing is queued if this raises.

        Raises:
            InvalidRequestError: the request is wrong; the error names the field.
            IncompatibleError: its steering does not fit the model.
            CapacityError: the queue or the feature bank is full.
        """
        prompt = encode_prompt(request, self.model, self.config.max_model_len)
        check_token_ids(request.sampling, self.model.vocab_size)
        catalog = self.catalog  # the one in force now: what is compiled against it stays
        check_limits(request, find_policies(request.policies, catalog))
        steering = request.steering
        asks = bool(steering.interventions or steering.guards or request.policies or request.is_reading)
        plan = self._plan(steering, request.policies, catalog, request.is_reading) if asks else self._bare_plan
        if len(plan.scores) > SCORES_PER_TOKEN:
            expected = f"at most {SCORES_PER_TOKEN} gates and guards, equal gates counted once"
            raise InvalidRequestError("steering.guards", f"{len(plan.scores)} gates and guards", expected)
        self._scheduler.check_entries(most_entries(plan))
        _check_report(request, len(prompt), plan)
        with self._lock:
            if request.request_id in self._unfinished:
                raise InvalidRequestError("request_id", request.request_id, "an id that no unfinished request has")
            if sum(self._unfinished.values()) - self.num_running >= self.config.max_waiting:
                raise CapacityError(f"the queue is full: {self.config.max_waiting} responses are waiting")
            entries = PlanEntries(plan, self._bank.acquire(plan))
            self._unfinished[request.request_id] = request.sampling.n
            arrival, self._num_arrivals = self._num_arrivals, self._num_arrivals + request.sampling.n
        try:
            sequence = self._sequence(request, 0, prompt, entries, arrival, self._deadline(request))
            sequence.num_to_launch = request.sampling.n - 1
        except BaseException:
            with self._lock:
                self._bank.release(plan)
                del self._unfinished[request.request_id]
            raise
        with self._lock:
            self._incoming.append(sequence)

    def replace_policies(self, policies: PolicySet) -> PolicyChanges:
        """Put a set of policies in force, for requests that are added from now on; may be called from any thread.

        Raises:
            PolicyError: one of them changed without a new version, or can not be served here.
            CapacityError: requests hold too many features of the bank.
            Nothing changes after either.
        """
        catalog = replace(self.catalog, policy_files=policies.policies)
        plans = {policy.name: self._policy_plan(policy, catalog) for policy in catalog.policies.values()}
        unfit = [policy.tag for name, policy in policies.policies.items() if plans[name] is None]
        if unfit:
            sites = ", ".join(map(str, sorted(self.sites)))
            raise PolicyError([f"{tag}: acts at sites that are not steered, expected {sites}" for tag in unfit])
        with self._lock:
            changes = policies.changes_since(PolicySet(self.catalog.policy_files))
            try:
                self._bank.pin([self._bare_plan, *(plan for plan in plans.values() if plan is not None)])
            except InvalidRequestError as error:
                raise PolicyError([f"all policies together: {error}"]) from error
            self.catalog = catalog
        return changes

    def abort(self, request_id: str) -> None:
        """End a request at the next step, which returns its last outputs; unknown ids are ignored."""
        with self._lock:
            if request_id in self._unfinished:
                self._aborted.add(request_id)

    def close(self) -> None:
        """Give the model back as it was; the engine is not to be used afterwards."""
        self._runner.close()

    def has_unfinished(self) -> bool:
        """Some request waits for ``step``."""
        with self._lock:
            return bool(self._unfinished)

    @property
    def num_running(self) -> int:
        """Responses that hold memory of the KV cache."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Responses in the queue."""
        return len(self._incoming) + len(self._scheduler.waiting)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache that requests hold; what is only kept for others to find does not count."""
        pool = self._scheduler.pool
        return 1 - pool.num_free / len(pool.blocks)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that were allocated for weights, KV cache and plans.

        What detectors read is kept with cached blocks, and takes at most as much again as the KV cache.
        """
        weights = {parameter.data_ptr(): parameter.nbytes for parameter in self.model.model.parameters()}
        return {
            "weights": sum(weights.values()),
            "kv_cache": self._runner.kv_store.num_bytes,
            "plans": self._runner.splicer.num_bytes + self._bank.num_bytes,
        }

    def step(self) -> list[StepOutput]:
        """One model step; at most one output for each response, the last of which ends it."""
        outputs = self._end_early()
        schedule = self._scheduler.schedule()
        self.num_preemptions += len(schedule.preempted)
        for sequence in schedule.preempted:
            sequence.num_blocks_placed = sequence.num_blocks_cached = 0
        for sequence, cached in schedule.admitted:
            outputs += self._replay(sequence, cached)
        chunks = [chunk for chunk in schedule.chunks if chunk.sequence.row is not None]
        if chunks:
            outputs += self._run(chunks)
        return outputs

    # Admission.

    def _plan(self, spec: SteeringSpec, policies: Items[str], catalog: Catalog, is_reading: bool = False) -> Plan:
        # Monitors watch the model at its own work, at any layer: not a text that another one wrote.
        monitors = () if is_reading else self.monitors.edits
        return compile_plan(spec, policies, catalog, self.sites, monitors)

    def _policy_plan(self, policy: Policy, catalog: Catalog | None = None) -> Plan | None:
        """What a policy alone comes to; None if its sites are not steered."""
        try:
            plan = self._plan(SteeringSpec(), (policy.tag,), catalog or self.catalog)
            self._scheduler.check_entries(most_entries(plan))
        except IncompatibleError:
            return None
        return plan

    def _sequence(
        self,
        request: GenerateRequest,
        index: int,
        prompt: Items[int],
        entries: PlanEntries,
        arrival: int,
        deadline: float | None,
    ) -> Sequence:
        num_layers = entries.plan.num_layers if request.is_reading else self.model.n_layers
        kv_bytes = self._runner.kv_store.num_bytes // (self.config.num_blocks * self.config.block_size)
        return Sequence(
            request,
            index,
            prompt,
            entries,
            Detokenizer(self.model.tokenizer, prompt),
            num_layers,
            # What was computed in some of the layers serves those that need no others.
            root_key=sha256(f"{self.model.fingerprint} {num_layers} {request.cache_salt}".encode()).digest(),
            block_size=self.config.block_size,
            arrival=arrival,
            deadline=deadline,
            # A cached block keeps the records of its positions: never more than the block itself takes.
            is_cacheable=self.config.enable_prefix_caching and entries.record_bytes <= kv_bytes,
        )

    def _deadline(self, request: GenerateRequest) -> float | None:
        return None if request.timeout_s is None else self._clock() + request.timeout_s

    def _end_early(self) -> list[StepOutput]:
        """Take in what was added; end what was aborted or is out of time."""
        with self._lock:
            incoming, self._incoming = self._incoming, deque()
            aborted = set(self._aborted)  # one that another thread is still adding stays until it is here
        for sequence in incoming:
            self._scheduler.add(sequence)
        outputs: list[StepOutput] = []
        now = self._clock()
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            if sequence.request_id in aborted:
                outputs += self._end(sequence, reason=FinishReason.ABORT)
            elif sequence.deadline is not None and now > sequence.deadline:
                timeout_s = sequence.request.timeout_s
                error = ServiceError("DEADLINE_EXCEEDED", f"not done within the {timeout_s:g} s it was given")
                outputs += self._end(sequence, error=error)
        return outputs

    def _replay(self, sequence: Sequence, cached: Items[Block]) -> list[StepOutput]:
        """Account for the positions that an admitted request takes from the prefix cache."""
        sequence.num_blocks_cached = len(cached)
        if sequence.num_read == 0:
            sequence.num_cached_tokens = len(cached) * self.config.block_size
        judgement = self._readings.replay(sequence, cached, self.config.block_size)
        return [] if judgement is None else self._end_judged(sequence, judgement)

    # One pass.

    def _run(self, chunks: Items[Chunk[Sequence]]) -> list[StepOutput]:
        for chunk in chunks:
            self._place_blocks(chunk.sequence)
        batch = FlatBatch.of(chunks)
        self._readings.prepare(batch.pieces)
        try:
            num_layers = max(chunk.sequence.num_layers for chunk in chunks)
            logits = self._runner.forward(batch.token_ids, batch.positions, batch.rows, batch.logits_at, num_layers)
        except Exception as error:
            # The pass is shared, so is its failure; the requests that wait must not suffer from it.
            return [output for chunk in chunks for output in self._end(chunk.sequence, error=error)]
        for chunk in chunks:
            self._scheduler.advance(chunk)
        judged = self._readings.read(batch.pieces)
        self._draw(batch.drawing, logits, judged)
        return [output for chunk in chunks for output in self._conclude(chunk.sequence, judged)]

    def _place_blocks(self, sequence: Sequence) -> None:
        placed = sequence.num_blocks_placed
        if len(sequence.blocks) > placed:
            assert sequence.row is not None
            self._runner.set_blocks(sequence.row, placed, [block.id for block in sequence.blocks[placed:]])
            sequence.num_blocks_placed = len(sequence.blocks)

    def _draw(self, drawing: Items[Sequence], logits: torch.Tensor, judged: dict[Sequence, Judgement]) -> None:
        """Give every sequence in ``drawing`` that may go on the token its logits ``[n, vocab]`` call for."""
        finite = logits.amax(dim=-1).isfinite().tolist()
        for sequence, is_finite in zip(drawing, finite, strict=False):
            if not is_finite:
                judged.setdefault(sequence, Judgement(_not_finite(sequence), position=sequence.num_computed))
        sound = [row for row, sequence in enumerate(drawing) if sequence not in judged]
        if not sound:
            return
        chosen = logits if len(sound) == len(logits) else logits[sound]
        drawn = next_tokens(chosen, [drawing[row].sampler for row in sound])
        for row, token in zip(sound, drawn, strict=True):
            drawing[row].append(token, self.model.eos_token_ids)
            self._launch_siblings(drawing[row])

    def _conclude(self, sequence: Sequence, judged: dict[Sequence, Judgement]) -> list[StepOutput]:
        """What a sequence's client gets to see of the step."""
        if sequence in judged:
            return self._end_judged(sequence, judged[sequence])
        if sequence.is_complete:
            return self._end(sequence, reason=sequence.finish_reason)
        return self._released(sequence)

    def _launch_siblings(self, sequence: Sequence) -> list[Sequence]:
        """Queue the request's other responses: the prompt is computed, they find it in the prefix cache."""
        siblings = [
            self._sequence(
                sequence.request,
                index,
                sequence.token_ids[: sequence.num_prompt_tokens],
                sequence.entries,
                sequence.arrival + index,
                sequence.deadline,
            )
            for index in range(1, sequence.num_to_launch + 1)
        ]
        sequence.num_to_launch = 0
        for sibling in siblings:
            self._scheduler.add(sibling)
        return siblings

    def _end_judged(self, sequence: Sequence, judgement: Judgement) -> list[StepOutput]:
        self._launch_siblings(sequence)  # what was read in the prompt is read by each response for itself
        if judgement.action is GuardAction.REWIND:
            self._rewind(sequence, judgement)
            return []
        scores = sequence.take_scores(judgement.position)
        reason = FinishReason.BLOCKED if judgement.error is None else None
        return [replace(last, scores=scores) for last in self._end(sequence, reason, judgement.error)]

    def _rewind(self, sequence: Sequence, judgement: Judgement) -> None:
        self._readings.close_log()
        # What was released is never taken back: soon after a rewind, fewer tokens are held than one takes.
        first_held = sequence.num_tokens - len(sequence.held)
        kept = max(first_held, judgement.position + 1 - judgement.rewind_tokens)
        sequence.rewind(kept)
        self._scheduler.truncate(sequence, kept - 1)
        sequence.num_blocks_placed = min(sequence.num_blocks_placed, len(sequence.blocks))
        sequence.num_blocks_cached = min(sequence.num_blocks_cached, sequence.num_computed // self.config.block_size)

    def _released(self, sequence: Sequence) -> list[StepOutput]:
        tokens, scores = sequence.release(), sequence.take_scores(sequence.num_computed)
        if not tokens and not scores:
            return []
        return [
            StepOutput(
                request_id=sequence.request_id,
                index=sequence.index,
                token_ids=tuple(token.token_id for token in tokens),
                text="".join(token.text for token in tokens),
                scores=scores,
                logprobs=tuple(entry for token in tokens for entry in token.logprobs),
                num_prompt_tokens=sequence.num_prompt_tokens,
            )
        ]

    def _end(
        self, sequence: Sequence, reason: FinishReason | None = None, error: Exception | None = None
    ) -> list[StepOutput]:
        """Free what a response holds; its last output, and those of siblings that have not begun."""
        siblings = self._launch_siblings(sequence)
        if self._readings.logs(sequence):
            self._readings.close_log()
        self._cache_blocks(sequence)
        is_complete = error is None and reason is sequence.finish_reason
        if is_complete:
            error = unproven(sequence.plan, sequence.receipt(self.model.fingerprint))
            if error is not None:
                reason, is_complete = None, False
        released = self._released(sequence) if is_complete else []
        self._scheduler.remove(sequence)
        with self._lock:
            self._unfinished[sequence.request_id] -= 1
            if not self._unfinished[sequence.request_id]:
                del self._unfinished[sequence.request_id]
                self._aborted.discard(sequence.request_id)
                self._bank.release(sequence.plan)
        receipt = sequence.receipt(self.model.fingerprint)
        last = released[0] if released else StepOutput(sequence.request_id, (), "", index=sequence.index)
        return [
            replace(
                last,
                text=last.text + ("" if is_complete else sequence.last_text()),
                finish_reason=reason,
                stop_reason=sequence.stop_reason if is_complete else None,
                num_prompt_tokens=sequence.num_prompt_tokens,
                receipt=receipt,
                guard_events=tuple(sequence.guard_events),
                verdicts=verdicts_of(receipt, sequence.guard_events, sequence.plan.thresholds),
                error=error,
            ),
            *(output for sibling in siblings for output in self._end(sibling, reason, error)),
        ]

    def _cache_blocks(self, sequence: Sequence) -> None:
        """Let others find the blocks that have become full."""
        if not sequence.is_cacheable:
            return
        num_full = sequence.num_computed // self.config.block_size
        for index in range(sequence.num_blocks_cached, num_full):
            record = sequence.block_record(index)
            if record is not None:
                self._scheduler.register(sequence, index, record)
        sequence.num_blocks_cached = max(sequence.num_blocks_cached, num_full)


def _sites(model: LoadedModel, catalog: Catalog, config: EngineConfig) -> list[Site]:
    """The sites that can be steered, in model order.

    Raises:
        IncompatibleError: the configuration names one that the model does not have.
    """
    if config.sites is not None:
        sites = {Site.parse(name, f"engine.sites[{index}]") for index, name in enumerate(config.sites)}
        for site in sites:
            check_site(site, "engine.sites", model)
        return sorted(sites)
    if config.compile:
        return catalog.sites
    return model.adapter.sites(model.model)


def _check_report(request: GenerateRequest, num_prompt_tokens: int, plan: Plan) -> None:
    """Refuse to collect more scores than a client can take."""
    sampling = request.sampling
    num_scores = sampling.n * (num_prompt_tokens + sampling.max_tokens) * len(plan.interventions)
    if request.return_activations and num_scores > MAX_SCORES:
        expected = f"at most {MAX_SCORES} scores: n x tokens x interventions"
        raise InvalidRequestError("return_activations", f"{num_scores} scores", expected)


def _not_finite(sequence: Sequence) -> Exception:
    steering = sequence.request.steering
    if steering.interventions or any(guard.rewind for guard in steering.guards):
        expected = "edits that leave the model's output finite"
        return InvalidRequestError("steering.interventions", "non-finite logits", expected)
    return SteerserveError("the model's logits are not finite")
