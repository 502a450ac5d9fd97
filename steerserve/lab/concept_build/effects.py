"""Which features cause a concept's words to be written.

Auto-labels and activation patterns do not pick features that steer well; effects do. Both measures look
at the model's output at the places where a listed word is about to be completed:

* ``attribute``: first-order effect of every feature on log P(completing token), summed over every
  position that feeds those places (activation × gradient, the gradient taken through the model).
* ``measure_effects``: what editing one feature in fact does there, which the first order only estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.progress import track

from steerserve.lab.activations import ordinary_rows
from steerserve.lab.concept_build.completions import Completions, TextBatch, tokenize
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.lab.concept_eval.teacher_forced import EarlierLayers, earlier_layers, logits_of, resumed
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Op, Site

BATCH_SIZE = 32


@dataclass(frozen=True, eq=False)
class Attribution:
    """What the features of one SAE do on some texts.

    Attributes:
        effect: ``[d_sae]`` mean effect on log P(completing token), per completed word.
        by_text: ``[n, d_sae]`` half precision, the part of it in each text, summed over its words.
        max_activation: ``[d_sae]`` largest activation.
    """

    effect: torch.Tensor
    by_text: torch.Tensor
    max_activation: torch.Tensor


def attribute(
    model: LoadedModel,
    saes: Sequence[SAE],
    texts: Sequence[str],
    completions: Completions,
    batch_size: int = BATCH_SIZE,
) -> list[Attribution]:
    """First-order effects of the features of several SAEs, in one pass over ``texts``.

    A feature's effect includes what it does to features of later SAEs.
    """
    parts: list[list[torch.Tensor]] = [[] for _ in saes]
    largest = [torch.zeros(sae.d_sae) for sae in saes]
    places = 0
    for start in track(range(0, len(texts), batch_size), "attribution"):
        batch = tokenize(model, texts[start : start + batch_size])
        where = completions.completed_next(batch)
        places += int(where.sum())
        at_sites = _gradients_at(model, [sae.site for sae in saes], batch, where, completions)
        for sae, part, (x, gradient), index in zip(saes, parts, at_sites, range(len(saes)), strict=True):
            keep = ordinary_rows(x) & batch.real
            f = sae.encode(x[keep])
            largest[index] = torch.maximum(largest[index], f.amax(0))
            row = keep.nonzero()[:, 0]
            part.append(torch.zeros(len(x), sae.d_sae).index_add_(0, row, f * (gradient[keep] @ sae.W_dec.T)).half())
    by_text = [torch.cat(part) for part in parts]
    return [
        Attribution(effects.float().sum(0) / max(places, 1), effects, maxima)
        for effects, maxima in zip(by_text, largest, strict=True)
    ]


def _gradients_at(
    model: LoadedModel, sites: Sequence[Site], batch: TextBatch, where: torch.Tensor, completions: Completions
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """At each site, the activation and the gradient of Σ log P(completion), ``[B, T, d]`` fp32."""
    seen: dict[Site, torch.Tensor] = {}

    def watch(site: Site, x: torch.Tensor) -> torch.Tensor:
        seen[site] = x if x.requires_grad else x.detach().requires_grad_()
        return seen[site]

    with transformed(model, {site: partial(watch, site) for site in sites}):
        log_probs = log_probs_at(model, batch.tokens, where)
    listed = completions.next_mask(batch.tokens[where])
    objective = log_probs.masked_fill(~listed, -torch.inf).logsumexp(-1).sum()
    gradients = torch.autograd.grad(objective, [seen[site] for site in sites])
    return [(seen[site].detach().float(), gradient.float()) for site, gradient in zip(sites, gradients, strict=True)]


def log_probs_at(model: LoadedModel, tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """``[n, V]`` next-token log-probabilities at the positions ``where`` only: the vocabulary is wide."""
    hidden = model.model.base_model(tokens, use_cache=False).last_hidden_state
    return logits_of(model, Treatment.none(model), hidden[where]).log_softmax(-1)


@torch.no_grad()
def measure_effects(
    model: LoadedModel,
    rows: SiteRows,
    op: Op,
    value: torch.Tensor,
    texts: Sequence[Sequence[str]],
    completions: Completions,
) -> torch.Tensor:
    """``[k]`` what editing each row alone does to the mean log P(completing token) where a word is completed.

    Args:
        value: ``[k]`` operands.
        texts: ``[k]`` those on which each row is measured.
    """
    changes = torch.zeros(len(rows))
    for index in track(range(len(rows)), f"effects at {rows.site}"):
        batch = tokenize(model, texts[index])
        where = completions.completed_next(batch)
        if not where.any():
            continue
        listed = completions.next_mask(batch.tokens[where])
        earlier, hidden = start_at(model, rows.site.layer, batch.tokens)
        plain = logits_of(model, Treatment.none(model), hidden[where]).log_softmax(-1)
        row, operand = rows.take([index]), value[index : index + 1]
        with resumed(model, earlier), transformed(model, {rows.site: _editing(row, op, operand)}):
            edited = log_probs_at(model, batch.tokens, where)
        before, after = (p.masked_fill(~listed, -torch.inf).logsumexp(-1) for p in (plain, edited))
        changes[index] = (after - before).mean()
    return changes


def _editing(rows: SiteRows, op: Op, value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: rows.edited(x, op, value)


def start_at(model: LoadedModel, layer: int, tokens: torch.Tensor) -> tuple[EarlierLayers, torch.Tensor]:
    """``earlier_layers``, with tensors that gradients may flow past."""
    earlier, hidden = earlier_layers(model, layer, tokens)
    return EarlierLayers(earlier.layer, earlier.x.clone()), hidden.clone()
