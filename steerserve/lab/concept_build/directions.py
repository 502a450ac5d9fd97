"""A concept as a direction: the unit difference of the mean activations of positive and negative texts.

Of plain texts the mean is taken over all ordinary positions; of user's turns in the chat template at the
last position, where the answer begins (Arditi et al. 2024, "Refusal is mediated by a single direction").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from steerserve.errors import AssetError
from steerserve.lab.activations import MASSIVE_NORM_RATIO, activations_of, ordinary_rows
from steerserve.lab.concept_build.site_rows import MIN_ACTIVATION, SiteRows
from steerserve.lab.concept_eval.prompts import candidates
from steerserve.lab.concept_eval.texts import FITTED_TOKENS, Corpus
from steerserve.lab.tokens import padded, tokenize
from steerserve.models.loading import LoadedModel
from steerserve.types import Site

BATCH_SIZE = 32


@dataclass(frozen=True, eq=False)
class ConceptDirection:
    """One direction, ``[1, d]``, with the mean projections of both kinds of texts; undefined on massive activations.

    Attributes:
        cap: ``[1]`` mean projection of negative texts.
        step: ``[1]`` how much further positive texts reach.
    """

    rows: SiteRows
    cap: torch.Tensor
    step: torch.Tensor


def difference_of_means(model: LoadedModel, site: Site, texts: Corpus, chat: bool, max_texts: int) -> ConceptDirection:
    """The direction from negative to positive texts at a site.

    Raises:
        AssetError: the means are the same.
    """
    (positive, norms), (negative, other_norms) = (
        _activations(model, site, kind[:max_texts], chat) for kind in (texts.positive, texts.negative)
    )
    difference = positive.mean(0) - negative.mean(0)
    length = difference.norm()
    if not length > 0:
        raise AssetError(f"positive and negative texts have the same mean activation at {site}")
    unit = difference / length
    max_norm = MASSIVE_NORM_RATIO * float(torch.cat([norms, other_norms]).median())
    rows = SiteRows.of_direction(site, unit, unit, max_norm=max_norm)
    largest = (positive @ unit).amax().clamp(min=MIN_ACTIVATION)
    return ConceptDirection(replace(rows, max_activation=largest[None]), (negative.mean(0) @ unit)[None], length[None])


def _activations(model: LoadedModel, site: Site, texts: Sequence[str], chat: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, d]`` float32: of every text its mean over ordinary positions, or of every turn its last position.

    With it |x| ``[m]`` at all ordinary positions.
    """
    parts, norms = [], []
    for tokens, real in _turns(model, texts) if chat else _plain(model, texts):
        x = activations_of(model, tokens, (site,))[site].float()
        ordinary = ordinary_rows(x, real)
        norms.append(x[ordinary].norm(dim=1))
        keep = _last(real) if chat else ordinary
        count = keep.sum(1)
        means = (x * keep[..., None]).sum(1) / count.clamp(min=1)[:, None]
        parts.append(means[count > 0])
    return torch.cat(parts), torch.cat(norms)


def _plain(model: LoadedModel, texts: Sequence[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the texts, and which positions are not padding."""
    for start in range(0, len(texts), BATCH_SIZE):
        batch = tokenize(model, texts[start : start + BATCH_SIZE], FITTED_TOKENS)
        yield batch.tokens, batch.real


def _turns(model: LoadedModel, texts: Sequence[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same of prompts of the chat template; texts too long for a trial are left out."""
    rows = [prompt.token_ids for prompt in candidates(model, texts, chat=True)]
    if not rows:
        raise AssetError("no text is short enough for a user's turn")
    for start in range(0, len(rows), BATCH_SIZE):
        yield padded(rows[start : start + BATCH_SIZE])


def _last(real: torch.Tensor) -> torch.Tensor:
    """The last real position of each row; mask like ``real``."""
    mask = torch.zeros_like(real)
    mask[torch.arange(len(real)), real.sum(1) - 1] = True
    return mask
