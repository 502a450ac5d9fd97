"""A treated model on given text: the plan that a request would compile to, through the kernel that serves it.

Generation goes through the engine. Where the text is fixed (KL, perplexity, scores, multiple choice) one forward
pass over whole texts says the same at a fraction of the cost: every position is in scope, and every site's edits
come from ``steer_delta_``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from steerserve.kernels.steer_delta import Normalization, steer_delta_
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.tokens import bos_of
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.steering.plan import Plan, SitePlan
from steerserve.types import Site


@dataclass(frozen=True, eq=False)
class EarlierLayers:
    """What lies before the first edit, computed once: ``x`` ``[B, T, d]`` is the input of ``layer``."""

    layer: int
    x: torch.Tensor


class Trace:
    """What a plan did in one forward pass over ``[B, T]`` tokens.

    Attributes:
        relative_edit: ``[B, T]`` Σ over sites of |x' − x| / |x|; above 0 where something was edited.
        scores: ``[B, T, G]`` of ``plan.scores``.
    """

    def __init__(self, plan: Plan, shape: tuple[int, int]) -> None:
        self.relative_edit = torch.zeros(shape)
        self.scores = torch.zeros(*shape, len(plan.scores))
        self._thresholds = torch.tensor([score.threshold for score in plan.scores], dtype=torch.float32)
        self._parts: dict[Site, list[SitePlan]] = {}
        for part in plan.sites:
            self._parts.setdefault(part.site, []).append(part)

    def functions(self) -> dict[Site, partial[torch.Tensor]]:
        """For ``transformed``."""
        return {site: partial(self._edit, parts) for site, parts in self._parts.items()}

    def _edit(self, parts: list[SitePlan], x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).clone()
        for part in parts:
            edit_rows(part, rows, self.scores.view(len(rows), -1), self._thresholds)
        edited = rows.view_as(x)
        self.relative_edit += (edited.float() - x.float()).norm(dim=-1) / x.float().norm(dim=-1).clamp(min=1e-9)
        return edited


def edit_rows(part: SitePlan, rows: torch.Tensor, scores: torch.Tensor, thresholds: torch.Tensor) -> None:
    """Apply one stage at one site to ``rows`` ``[N, d]``, in place; ``scores`` ``[N, G]`` are added to."""
    n, k, num_scores = len(rows), len(part.row), scores.shape[1]
    offsets = num_scores * torch.arange(n, dtype=torch.int32)[:, None]
    score_index = torch.from_numpy(part.score_index)
    bank = part.rows
    steer_delta_(
        rows,
        torch.arange(0, n * k + 1, k, dtype=torch.int32),
        torch.from_numpy(part.row).repeat(n),
        torch.from_numpy(part.op).repeat(n),
        torch.from_numpy(part.value).repeat(n),
        torch.where(score_index >= 0, score_index + offsets, -1).flatten().contiguous(),
        torch.from_numpy(bank.W_enc),
        torch.from_numpy(bank.b_enc),
        torch.from_numpy(bank.threshold),
        torch.from_numpy(bank.max_norm),
        torch.full((len(bank),), Normalization.NONE, dtype=torch.uint8),
        torch.from_numpy(bank.W_dec),
        num_scores * torch.arange(n + 1, dtype=torch.int32),
        thresholds.repeat(n),
        scores.view(-1),
        torch.empty(n * k),
        torch.empty(n * k),
        torch.empty(n),
    )


@torch.inference_mode()
def last_hidden(
    model: LoadedModel, treatment: Treatment, tokens: torch.Tensor, earlier: EarlierLayers | None = None
) -> tuple[torch.Tensor, Trace]:
    """Final hidden states ``[B, T, d]`` of ``tokens`` ``[B, T]`` behind the treatment's prefix, and what was done.

    Of a BOS token they are those of the prefix's last token, which stands in its place.
    ``earlier`` saves the layers before the first edit; a treatment with a prefix has to run them.
    """
    prefix = torch.tensor(treatment.prefix, dtype=torch.long).expand(len(tokens), -1)
    num_replaced = len(bos_of(model)) if treatment.prefix else 0
    fed = torch.cat([prefix, tokens[:, num_replaced:].long()], dim=1)
    trace = Trace(treatment.plan, (fed.shape[0], fed.shape[1]))
    skip = resumed(model, earlier) if earlier is not None and not treatment.prefix else nullcontext()
    with skip, transformed(model, trace.functions()):
        hidden = model.model.base_model(fed, use_cache=False).last_hidden_state
    start = len(treatment.prefix) - num_replaced
    trace.relative_edit, trace.scores = trace.relative_edit[:, start:], trace.scores[:, start:]
    return hidden[:, start:], trace


def logits_of(model: LoadedModel, treatment: Treatment, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits ``[..., V]`` in float32, with the treatment's bias."""
    logits: torch.Tensor = model.model.get_output_embeddings()(hidden).float()
    cap = getattr(model.model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    if treatment.logit_bias:
        tokens = torch.tensor(list(treatment.logit_bias))
        logits[..., tokens] += torch.tensor(list(treatment.logit_bias.values()))
    return logits


@torch.inference_mode()
def scores_of(model: LoadedModel, treatment: Treatment, tokens: torch.Tensor) -> torch.Tensor:
    """``[B, T, G]`` the plan's scores; the forward pass stops behind its last site."""
    trace = Trace(treatment.plan, (tokens.shape[0], tokens.shape[1]))
    last = max(part.site for part in treatment.plan.sites)

    class _ReadError(Exception):
        pass

    functions = trace.functions()
    read = functions[last]

    def read_and_stop(x: torch.Tensor) -> torch.Tensor:
        read(x)
        raise _ReadError

    try:
        with transformed(model, {**functions, last: read_and_stop}):
            model.model(tokens.long(), use_cache=False, logits_to_keep=1)
    except _ReadError:
        pass
    return trace.scores


@torch.inference_mode()
def earlier_layers(model: LoadedModel, layer: int, tokens: torch.Tensor) -> tuple[EarlierLayers, torch.Tensor]:
    """The input of ``layer`` and the final hidden states ``[B, T, d]`` of the untreated model."""
    kept: list[torch.Tensor] = []
    handle = model.adapter.layers(model.model)[layer].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        hidden = model.model.base_model(tokens.long(), use_cache=False).last_hidden_state
    finally:
        handle.remove()
    return EarlierLayers(layer, kept[0]), hidden


@contextmanager
def resumed(model: LoadedModel, earlier: EarlierLayers) -> Iterator[None]:
    """Forward passes inside the block start at ``earlier.layer``, whose input is given."""
    layers = model.adapter.layers(model.model)
    handle = layers[earlier.layer].register_forward_pre_hook(lambda _, args: (earlier.x, *args[1:]))
    for layer in layers[: earlier.layer]:
        layer.forward = lambda x, *_, **__: x
    try:
        yield
    finally:
        handle.remove()
        for layer in layers[: earlier.layer]:
            del layer.forward
