"""Which features cause a concept's words to be written.

Auto-labels and activation patterns do not pick features that steer well; effects do. Both measures look
at the probability that the model gives to the concept's words:

* ``attribute``: first-order effect of every feature on Σ P(completing token), summed over every position
  that feeds it (activation × gradient, the gradient taken through the model).
* ``measure_effects``: what editing one feature in fact does there, which the first order only estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.progress import track

from steerserve.lab.activations import ordinary_rows
from steerserve.lab.concept_build.completions import Completions
from steerserve.lab.concept_build.contexts import Contexts, word_probability
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Op, Site

STEEPEST = 200
"""Gradients kept of each batch, the longest ones."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """What the features of one SAE do in some contexts.

    Attributes:
        effect: ``[d_sae]`` on Σ P(completing token), summed over all contexts.
        by_context: ``[n, d_sae]`` half precision, the part of it in each context.
        max_activation: ``[d_sae]`` largest activation.
        gradients: ``[m, d]`` the longest gradients of Σ P(completing token) with respect to the activation.
    """

    effect: torch.Tensor
    by_context: torch.Tensor
    max_activation: torch.Tensor
    gradients: torch.Tensor


def attribute(
    model: LoadedModel, saes: Sequence[SAE], contexts: Contexts, completions: Completions
) -> list[Attribution]:
    """First-order effects of the features of several SAEs, in one pass over ``contexts``.

    A feature's effect includes what it does to features of later SAEs.
    """
    parts: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = [[] for _ in saes]
    for batch in track(list(contexts.batches()), "attribution"):
        at_sites = _gradients_at(model, [sae.site for sae in saes], batch, completions)
        for sae, part, (x, gradient) in zip(saes, parts, at_sites, strict=True):
            keep = ordinary_rows(x, batch.real)
            f = sae.encode(x[keep])
            effects = torch.zeros(len(x), sae.d_sae)
            effects.index_add_(0, keep.nonzero()[:, 0], f * (gradient[keep] @ sae.W_dec.T))
            kept = gradient[keep]
            steepest = kept[kept.norm(dim=1).topk(min(STEEPEST, len(kept))).indices]
            part.append((effects.half(), f.amax(0), steepest))
    return [_joined(part) for part in parts]


def _joined(parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Attribution:
    effects, largest, gradients = zip(*parts, strict=True)
    by_context = torch.cat(effects)
    return Attribution(by_context.float().sum(0), by_context, torch.stack(largest).amax(0), torch.cat(gradients))


def _gradients_at(
    model: LoadedModel, sites: Sequence[Site], batch: Contexts, completions: Completions
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """At each site, the activation and the gradient of Σ P(completion), ``[B, T, d]`` fp32."""
    seen: dict[Site, torch.Tensor] = {}

    def watch(site: Site, x: torch.Tensor) -> torch.Tensor:
        seen[site] = x if x.requires_grad else x.detach().requires_grad_()
        return seen[site]

    with transformed(model, {site: partial(watch, site) for site in sites}):
        log_probs = batch.log_probs(model, batch.scored)
    objective = word_probability(log_probs, completions.next_mask(batch.tokens[batch.scored]))
    gradients = torch.autograd.grad(objective, [seen[site] for site in sites])
    return [(seen[site].detach().float(), gradient.float()) for site, gradient in zip(sites, gradients, strict=True)]


@torch.no_grad()
def measure_effects(
    model: LoadedModel,
    rows: SiteRows,
    op: Op,
    value: torch.Tensor,
    contexts: Contexts,
    where: torch.Tensor,
    completions: Completions,
) -> torch.Tensor:
    """``[k]`` what editing each row alone does to log Σ P(completing token).

    Args:
        value: ``[k]`` operands.
        where: ``[k, m]`` the contexts on which each row is measured.
    """
    changes = torch.zeros(len(rows))
    for index in track(range(len(rows)), f"effects at {rows.site}"):
        batch = contexts.take(where[index])
        listed = completions.next_mask(batch.tokens[batch.scored])
        edit = partial(rows.take([index]).edited, op=op, value=value[index : index + 1])
        before = word_probability(batch.log_probs(model, batch.scored), listed)
        with transformed(model, {rows.site: edit}):
            after = word_probability(batch.log_probs(model, batch.scored), listed)
        changes[index] = (after / before.clamp(min=1e-12)).clamp(min=1e-12).log()
    return changes
