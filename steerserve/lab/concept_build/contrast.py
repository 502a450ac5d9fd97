"""What tells positive texts from negative ones: words, and features that fire in them.

Words by log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008): counts of both
kinds are smoothed towards the whole corpus, and the difference of log-odds is divided by its standard
deviation, so that neither rare nor common words win by their frequency. A text counts a word once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.concept_eval.texts import FITTED_TOKENS
from steerserve.lab.tokens import tokenize
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE

_WORD = re.compile(r"[^\W\d_][\w'’-]*[^\W_]")
PRIOR_WORDS = 500.0
"""Weight of the prior, in occurrences."""
MIN_TEXTS = 3
MIN_Z = 3.0
MIN_LOG_ODDS = 1.0
"""A word is at least e times as likely in positive texts."""
MAX_WORDS = 200

BATCH_SIZE = 32
COLUMNS = 4096
"""Features ranked at a time."""


@dataclass(frozen=True)
class ContrastWord:
    """A word of positive texts: ``positive`` and ``negative`` texts hold it; ``z`` is log-odds by its deviation."""

    word: str
    z: float
    log_odds: float
    positive: int
    negative: int


def contrast_words(positive: Sequence[str], negative: Sequence[str]) -> list[ContrastWord]:
    """The words that tell positive texts, by falling z.

    Raises:
        AssetError: no word does.
    """
    ours, theirs = _text_counts(positive), _text_counts(negative)
    num_ours, num_theirs = sum(ours.values()), sum(theirs.values())
    words = []
    for word, count in ours.items():
        if count < MIN_TEXTS:
            continue
        prior = PRIOR_WORDS * (count + theirs[word]) / (num_ours + num_theirs)
        log_odds = _log_odds(count + prior, num_ours + PRIOR_WORDS) - _log_odds(
            theirs[word] + prior, num_theirs + PRIOR_WORDS
        )
        z = log_odds / math.sqrt(1 / (count + prior) + 1 / (theirs[word] + prior))
        if z >= MIN_Z and log_odds >= MIN_LOG_ODDS:
            words.append(ContrastWord(word, z, log_odds, count, theirs[word]))
    if not words:
        raise AssetError(
            f"no word tells the {len(positive)} positive texts from the {len(negative)} negative ones: "
            f"expected one in {MIN_TEXTS} positive texts or more with a z of {MIN_Z:g}; give a word list"
        )
    return sorted(words, key=lambda word: (-word.z, word.word))[:MAX_WORDS]


def _text_counts(texts: Sequence[str]) -> Counter[str]:
    return Counter(word for text in texts for word in {match.group().lower() for match in _WORD.finditer(text)})


def _log_odds(count: float, total: float) -> float:
    return math.log(count / (total - count))


@dataclass(frozen=True, eq=False)
class FeatureContrast:
    """How the features of one SAE tell positive texts; all ``[d_sae]``.

    Attributes:
        auroc: of a feature's largest activation in a text.
        density_positive, density_negative: share of texts in which it is active.
    """

    auroc: torch.Tensor
    density_positive: torch.Tensor
    density_negative: torch.Tensor

    def candidates(self, count: int) -> list[int]:
        """At most ``count`` features that fire more, and in no fewer, positive texts; by falling AUROC."""
        telling = (self.density_positive >= self.density_negative) & (self.auroc > 0.5)
        score = self.auroc.masked_fill(~telling, -1.0)
        order = score.argsort(descending=True, stable=True)[:count]
        return [feature for feature in order.tolist() if score[feature] > 0]


def contrast_features(
    model: LoadedModel, saes: Sequence[SAE], positive: Sequence[str], negative: Sequence[str]
) -> list[FeatureContrast]:
    """How the features of each SAE tell the texts, which are run once for all of them."""
    largest = _largest_activations(model, saes, [*positive, *negative])
    return [_contrast(activations, len(positive)) for activations in largest]


@torch.inference_mode()
def _largest_activations(model: LoadedModel, saes: Sequence[SAE], texts: Sequence[str]) -> list[torch.Tensor]:
    """For each SAE ``[n, d_sae]`` half precision: each feature's largest activation in each text."""
    parts: list[list[torch.Tensor]] = [[] for _ in saes]
    for start in track(range(0, len(texts), BATCH_SIZE), "contrast"):
        batch = tokenize(model, texts[start : start + BATCH_SIZE], FITTED_TOKENS)
        at_sites = activations_of(model, batch.tokens, tuple({sae.site for sae in saes}))
        for sae, part in zip(saes, parts, strict=True):
            x = at_sites[sae.site].float()
            f = sae.encode(x) * ordinary_rows(x, batch.real)[..., None]
            part.append(f.amax(1).half())
    return [torch.cat(part) for part in parts]


def _contrast(largest: torch.Tensor, num_positive: int) -> FeatureContrast:
    active = largest > 0
    chunks = [auroc(chunk.float().numpy(), num_positive) for chunk in largest.split(COLUMNS, dim=1)]
    return FeatureContrast(
        auroc=torch.from_numpy(np.concatenate(chunks)).float(),
        density_positive=active[:num_positive].float().mean(0),
        density_negative=active[num_positive:].float().mean(0),
    )


def auroc(scores: npt.NDArray[np.float32], num_positive: int) -> npt.NDArray[np.float64]:
    """``[k]`` probability that a positive text has the higher score; ``scores`` ``[n, k]``, positive rows first."""
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=0)[:num_positive].sum(0)
    num_negative = len(scores) - num_positive
    above: npt.NDArray[np.float64] = (ranks - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)
    return above
