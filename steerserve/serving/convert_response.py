"""Responses: plain types to wire messages and back."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from steerserve.serving.convert_steering import GUARD_ACTIONS, guard_action_to_proto
from steerserve.types import (
    FinishReason,
    GuardEvent,
    InterventionReceipt,
    MonitorReceipt,
    PositionScores,
    Receipt,
    Site,
    StepOutput,
    StopReason,
    TokenLogprobs,
    Verdict,
    VerdictKind,
    overall_verdict,
)
from steerserve.v1 import generation_pb2, receipt_pb2, verdict_pb2

if TYPE_CHECKING:  # torch: a client needs none
    from steerserve.engine.engine import Engine
    from steerserve.steering.monitors import Monitors

_FINISH_REASONS = {generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}"): reason for reason in FinishReason}
VERDICT_KINDS = {verdict_pb2.VerdictKind.Value(f"VERDICT_KIND_{kind.name}"): kind for kind in VerdictKind}


def response_to_proto(outputs: Sequence[StepOutput]) -> generation_pb2.GenerateResponse:
    """Join all outputs of one request, every response of which has finished."""
    pieces: defaultdict[int, list[StepOutput]] = defaultdict(list)
    for output in outputs:
        pieces[output.index].append(output)
    return generation_pb2.GenerateResponse(
        request_id=outputs[-1].request_id, completions=[_completion_to_proto(pieces[index]) for index in sorted(pieces)]
    )


def step_to_proto(output: StepOutput, num_generated_tokens: int) -> generation_pb2.GenerateStreamResponse:
    """Write one piece of a stream; ``num_generated_tokens`` counts up to and with this piece of its response."""
    return generation_pb2.GenerateStreamResponse(
        request_id=output.request_id,
        index=output.index,
        text=output.text,
        token_ids=generation_pb2.TokenIds(ids=output.token_ids),
        scores=_scores_to_proto(output.scores),
        logprobs=_logprobs_to_proto(output.logprobs),
        finish_info=None if output.finish_reason is None else _finish_to_proto(output, num_generated_tokens),
    )


def outputs_from_proto(message: generation_pb2.GenerateResponse) -> tuple[StepOutput, ...]:
    """Read whole responses, each as a single piece."""
    return tuple(
        _output_from_proto(completion, message.request_id, index)
        for index, completion in enumerate(message.completions)
    )


def piece_from_proto(message: generation_pb2.GenerateStreamResponse) -> StepOutput:
    """Read one piece of a stream."""
    return _output_from_proto(message, message.request_id, message.index)


def receipt_to_proto(receipt: Receipt) -> receipt_pb2.Receipt:
    """Write a receipt."""
    return receipt_pb2.Receipt(
        plan_hash=receipt.plan_hash,
        model_fingerprint=receipt.model_fingerprint,
        policies=receipt.policies,
        packs=receipt.packs,
        steered=receipt.steered,
        num_rewinds=receipt.num_rewinds,
        num_rewound_tokens=receipt.num_rewound_tokens,
        num_cached_tokens=receipt.num_cached_tokens,
        num_redacted_tokens=receipt.num_redacted_tokens,
        interventions=[
            receipt_pb2.InterventionReceipt(**(vars(entry) | {"site": str(entry.site)}))
            for entry in receipt.interventions
        ],
        monitors=[
            receipt_pb2.MonitorReceipt(**(vars(entry) | {"site": str(entry.site)})) for entry in receipt.monitors
        ],
    )


def receipt_from_proto(message: receipt_pb2.Receipt) -> Receipt:
    """Read a receipt."""
    return Receipt(
        plan_hash=message.plan_hash,
        model_fingerprint=message.model_fingerprint,
        policies=tuple(message.policies),
        packs=dict(message.packs),
        steered=message.steered,
        num_rewinds=message.num_rewinds,
        num_rewound_tokens=message.num_rewound_tokens,
        num_cached_tokens=message.num_cached_tokens,
        num_redacted_tokens=message.num_redacted_tokens,
        interventions=tuple(
            InterventionReceipt(
                source=entry.source,
                label=entry.label,
                site=Site.parse(entry.site),
                tokens_in_scope=entry.tokens_in_scope,
                tokens_covered=entry.tokens_covered,
                tokens_edited=entry.tokens_edited,
                mean_relative_edit=entry.mean_relative_edit,
                max_activation=entry.max_activation,
                overridden_by=tuple(entry.overridden_by),
            )
            for entry in message.interventions
        ),
        monitors=tuple(
            MonitorReceipt(
                source=entry.source,
                label=entry.label,
                site=Site.parse(entry.site),
                tokens_in_scope=entry.tokens_in_scope,
                tokens_covered=entry.tokens_covered,
                max_score=entry.max_score,
                mean_score=entry.mean_score,
            )
            for entry in message.monitors
        ),
    )


def model_info_to_proto(engine: Engine) -> generation_pb2.GetModelInfoResponse:
    """Describe the model and everything that requests can name."""
    model, catalog = engine.model, engine.catalog
    return generation_pb2.GetModelInfoResponse(
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        d_model=model.d_model,
        n_layers=model.n_layers,
        max_model_len=engine.config.max_model_len,
        sites=[str(site) for site in sorted(engine.sites)],
        saes=[
            generation_pb2.SaeInfo(name=sae.name, site=str(sae.site), d_sae=sae.d_sae, sha256=sae.sha256)
            for sae in catalog.saes.values()
        ],
        concepts=[
            generation_pb2.ConceptInfo(
                name=pack.name,
                version=pack.card.version,
                description=pack.card.description,
                site=str(pack.detector_site),
                num_features=len(pack.tensors),
                evaluation_json=json.dumps(pack.card.evaluation),
                sites=map(str, pack.sites),
            )
            for pack in catalog.packs.values()
        ],
        policies=[policy.tag for policy in catalog.policies.values()],
        n_heads=model.n_heads,
        d_head=model.d_head,
        monitor_plan=_monitors_to_proto(engine.monitors),
    )


def _monitors_to_proto(monitors: Monitors) -> generation_pb2.MonitorPlanInfo | None:
    plan = monitors.plan
    if plan is None:
        return None
    return generation_pb2.MonitorPlanInfo(
        name=plan.name,
        behaviour=plan.behaviour,
        entries=[
            generation_pb2.MonitorInfo(
                name=entry.name,
                site=str(edit.target.site),
                reading=edit.target.label,
                frequency=entry.frequency,
                specificity=entry.specificity,
            )
            for entry, edit in zip(plan.entries, monitors.edits, strict=True)
        ],
        provenance_json=plan.provenance.model_dump_json(),
        protocol_json=json.dumps(plan.protocol),
    )


def _completion_to_proto(pieces: Sequence[StepOutput]) -> generation_pb2.Completion:
    token_ids = [token for piece in pieces for token in piece.token_ids]
    return generation_pb2.Completion(
        text="".join(piece.text for piece in pieces),
        token_ids=generation_pb2.TokenIds(ids=token_ids),
        scores=[scores for piece in pieces for scores in _scores_to_proto(piece.scores)],
        logprobs=[entry for piece in pieces for entry in _logprobs_to_proto(piece.logprobs)],
        finish_info=_finish_to_proto(pieces[-1], len(token_ids)),
    )


def _output_from_proto(
    message: generation_pb2.Completion | generation_pb2.GenerateStreamResponse, request_id: str, index: int
) -> StepOutput:
    finished = message.HasField("finish_info")
    finish = message.finish_info
    return StepOutput(
        request_id=request_id,
        index=index,
        token_ids=tuple(message.token_ids.ids),
        text=message.text,
        scores=tuple(
            PositionScores(
                scores.position,
                np.array(scores.scores, dtype=np.float32),
                np.array(scores.monitors, dtype=np.float32),
            )
            for scores in message.scores
        ),
        logprobs=tuple(
            TokenLogprobs(entry.logprob, entry.rank, tuple((top.token_id, top.logprob) for top in entry.top))
            for entry in message.logprobs
        ),
        finish_reason=_FINISH_REASONS[finish.finish_reason] if finished else None,
        stop_reason=_stop_reason_from_proto(finish),
        num_prompt_tokens=finish.num_prompt_tokens,
        receipt=receipt_from_proto(finish.receipt) if finish.HasField("receipt") else None,
        guard_events=tuple(
            GuardEvent(event.guard, GUARD_ACTIONS[event.action], event.position, event.score, event.source, event.label)
            for event in finish.guard_events
        ),
        verdicts=tuple(_verdict_from_proto(verdict) for verdict in finish.verdicts),
    )


def _finish_to_proto(output: StepOutput, num_generated_tokens: int) -> generation_pb2.FinishInfo:
    assert output.finish_reason is not None, "only the last output of a response ends it"
    message = generation_pb2.FinishInfo(
        finish_reason=generation_pb2.FinishReason.Value(f"FINISH_REASON_{output.finish_reason.name}"),
        num_prompt_tokens=output.num_prompt_tokens,
        num_generated_tokens=num_generated_tokens,
        receipt=None if output.receipt is None else receipt_to_proto(output.receipt),
        guard_events=[
            generation_pb2.GuardEvent(
                guard=event.guard,
                action=guard_action_to_proto(event.action),
                position=event.position,
                score=event.score,
                source=event.source,
                label=event.label,
            )
            for event in output.guard_events
        ],
        verdict=verdict_kind_to_proto(overall_verdict(output.verdicts)),
        verdicts=[_verdict_to_proto(verdict) for verdict in output.verdicts],
    )
    match output.stop_reason:
        case str(stop_string):
            message.stop_string = stop_string
        case int(token_id):
            message.stop_token_id = token_id
    return message


def _verdict_to_proto(verdict: Verdict) -> verdict_pb2.Verdict:
    return verdict_pb2.Verdict(**(vars(verdict) | {"kind": verdict_kind_to_proto(verdict.kind)}))


def verdict_kind_to_proto(kind: VerdictKind) -> verdict_pb2.VerdictKind.ValueType:
    return verdict_pb2.VerdictKind.Value(f"VERDICT_KIND_{kind.name}")


def _verdict_from_proto(message: verdict_pb2.Verdict) -> Verdict:
    return Verdict(
        kind=VERDICT_KINDS[message.kind],
        source=message.source,
        rule=message.rule,
        positions=tuple(message.positions),
        scores=tuple(message.scores),
        threshold=message.threshold if message.HasField("threshold") else None,
    )


def _stop_reason_from_proto(message: generation_pb2.FinishInfo) -> StopReason | None:
    match message.WhichOneof("stop_reason"):
        case "stop_string":
            return message.stop_string
        case "stop_token_id":
            return message.stop_token_id
        case _:
            return None


def _logprobs_to_proto(logprobs: Iterable[TokenLogprobs]) -> list[generation_pb2.TokenLogprobs]:
    return [
        generation_pb2.TokenLogprobs(
            logprob=entry.logprob,
            rank=entry.rank,
            top=[generation_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
        )
        for entry in logprobs
    ]


def _scores_to_proto(scores: Iterable[PositionScores]) -> list[receipt_pb2.PositionScores]:
    return [receipt_pb2.PositionScores(position=at.position, scores=at.scores, monitors=at.monitors) for at in scores]
