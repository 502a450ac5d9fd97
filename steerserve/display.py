"""How responses look in a terminal: receipts as tables, activations as the background of each token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from steerserve.types import GuardEvent, Receipt, StepOutput, TextScores, Verdict, VerdictKind, overall_verdict

_COLD, _HOT = (40, 40, 60), (220, 60, 30)


@dataclass(frozen=True)
class TokenScore:
    """One generated token's text and the score at its own position; NaN where none was read."""

    text: str
    score: float


def token_scores(pieces: Sequence[StepOutput], intervention: int = 0) -> list[TokenScore]:
    """The generated tokens of a finished stream with their scores under one intervention."""
    scores = {entry.position: float(entry.scores[intervention]) for piece in pieces for entry in piece.scores}
    position = pieces[-1].num_prompt_tokens
    tokens: list[TokenScore] = []
    for piece in pieces:
        own = [scores[at] for at in range(position, position + len(piece.token_ids)) if at in scores]
        tokens.append(TokenScore(piece.text, max(own, default=math.nan)))
        position += len(piece.token_ids)
    return tokens


def heat_strip(tokens: Iterable[TokenScore], full_scale: float) -> Text:
    """The tokens' text, each on a background from cold (0) to hot (``full_scale``); none where nothing fired."""
    strip = Text()
    for token in tokens:
        heat = min(token.score / full_scale, 1.0) if token.score > 0 and full_scale > 0 else 0.0
        strip.append(token.text, Style(color="#ffffff", bgcolor=_colour(heat)) if heat > 0 else Style.null())
    return strip


def response_view(pieces: Sequence[StepOutput], activations: bool) -> Group:
    """What there is to say about a finished response besides its text: the receipt last, of the rest what was asked."""
    last = pieces[-1]
    assert last.receipt is not None, "the last piece carries the receipt"
    parts: list[RenderableType] = []
    if activations:
        parts.append(activation_view(pieces, last.receipt))
    if any(piece.logprobs for piece in pieces):
        parts.append(_logprob_table(pieces))
    parts += [
        Text(f"{_guard_name(event)}: {event.action} at position {event.position}, score {event.score:.2f}", "yellow")
        for event in last.guard_events
    ]
    return Group(*parts, receipt_view(last.receipt), verdict_view(last.verdicts))


def verdict_view(verdicts: Sequence[Verdict]) -> Text:
    """The gravest verdict, then each with who came to it; positions are with the guards."""
    overall = overall_verdict(verdicts)
    view = Text(f"verdict: {overall.upper()}", "dim" if overall is VerdictKind.ALLOW else "bold yellow")
    for verdict in verdicts:
        view.append(f"\n  {verdict.source}: {verdict.kind.upper()}", "default")
        view.append(f" {verdict.rule}" if verdict.rule else "", "dim")
        view.append(f" at {len(verdict.positions)} tokens" if verdict.positions else "", "dim")
    return view


def score_view(text: str, read: TextScores) -> Group:
    """The text once per concept, each token above the threshold on a background: the largest score's is the hottest."""
    parts: list[RenderableType] = []
    for score in read.concepts.values():
        largest = score.largest
        said = "no token" if largest is None else f"{largest.score:.2f}, threshold {score.threshold:.2f}"
        flagged = ("FLAGGED", "bold yellow") if score.flagged else ("", "dim")
        parts.append(Text.assemble((f"{score.concept}: {said} ", "dim"), flagged))
        above = [TokenScore(text[token.start : token.end], token.score - score.threshold) for token in score.tokens]
        parts.append(heat_strip(above, peak(above)))
    for verdict in read.verdicts:
        words = ", ".join(repr(text[token.start : token.end]) for token in verdict.tokens)
        said = f" {verdict.rule}, above {verdict.threshold:.2f}: {words}" if verdict.threshold is not None else ""
        style = "dim" if verdict.kind is VerdictKind.ALLOW else "bold yellow"
        parts.append(Text.assemble((f"{verdict.policy}: ", "dim"), (verdict.kind.upper(), style), said))
    return Group(*parts)


def _guard_name(event: GuardEvent) -> str:
    return f"guard {event.guard}" if event.source == "request" else f"{event.source}, rule {event.label}"


def _logprob_table(pieces: Sequence[StepOutput]) -> Table:
    table = Table("token", "log-probability", "rank", "most likely", box=box.SIMPLE)
    for piece in pieces:
        for token_id, entry in zip(piece.token_ids, piece.logprobs, strict=True):
            top = ", ".join(f"{other} {logprob:.2f}" for other, logprob in entry.top)
            table.add_row(str(token_id), f"{entry.logprob:.2f}", str(entry.rank), top)
    return table


def activation_view(pieces: Sequence[StepOutput], receipt: Receipt) -> Group:
    """The response once per intervention, each on that intervention's activations."""
    strips: list[RenderableType] = []
    for index, entry in enumerate(receipt.interventions):
        tokens = token_scores(pieces, index)
        strips += [Text(f"{entry.label}, up to {entry.max_activation:.2f}:", "dim"), heat_strip(tokens, peak(tokens))]
    return Group(*strips)


def peak(tokens: Iterable[TokenScore]) -> float:
    """The largest score; 0 if nothing fired."""
    return max((token.score for token in tokens if token.score > 0), default=0.0)


def receipt_view(receipt: Receipt) -> RenderableType:
    """What ran: a row per intervention, then the verdict, the plan and the weights."""
    verdict = "steered" if receipt.steered else "not steered"
    plan = f"plan {receipt.plan_hash[:12]} · " if receipt.plan_hash else ""
    rewinds = f"rewinds: {receipt.num_rewinds}, {receipt.num_rewound_tokens} tokens · " if receipt.num_rewinds else ""
    redacted = f"redacted: {receipt.num_redacted_tokens} tokens · " if receipt.num_redacted_tokens else ""
    summary = Text(f"receipt: {verdict} · {rewinds}{redacted}{plan}model {receipt.model_fingerprint[:12]}", "dim")
    tables: list[RenderableType] = [_intervention_table(receipt)] if receipt.interventions else []
    if receipt.monitors:
        tables.append(_monitor_table(receipt))
    return Group(*tables, summary) if tables else summary


def _intervention_table(receipt: Receipt) -> Table:
    table = Table("intervention", box=box.SIMPLE)
    for heading in ("in scope", "covered", "edited", "|Δx|/|x|", "max score"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in receipt.interventions:
        overridden = f"\noverridden by {', '.join(entry.overridden_by)}" if entry.overridden_by else ""
        name = Text.assemble(entry.label, (f"\n{entry.source} at {entry.site}", "dim"), (overridden, "yellow"))
        counts = (entry.tokens_in_scope, entry.tokens_covered, entry.tokens_edited)
        table.add_row(name, *map(str, counts), f"{entry.mean_relative_edit:.3f}", f"{entry.max_activation:.2f}")
    return table


def _monitor_table(receipt: Receipt) -> Table:
    table = Table("monitor", box=box.SIMPLE)
    for heading in ("in scope", "covered", "mean score", "max score"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in receipt.monitors:
        name = Text.assemble(entry.label, (f"\n{entry.source} at {entry.site}", "dim"))
        counts = (entry.tokens_in_scope, entry.tokens_covered)
        table.add_row(name, *map(str, counts), f"{entry.mean_score:.2f}", f"{entry.max_score:.2f}")
    return table


def _colour(heat: float) -> str:
    mixed = (round(cold + (hot - cold) * heat) for cold, hot in zip(_COLD, _HOT, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
