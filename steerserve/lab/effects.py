"""Which features cause a word list to be written, and what to clamp them to.

Auto-labels and activation patterns do not pick features that steer well; effects do. Both methods
here look at the model's output at the places where a listed word is about to be completed:

* ``attribute``: first-order effect of each feature on log P(completing token), summed over every
  position that feeds those places (activation × gradient, the gradient taken through the model).
* ``fit_clamps``: clamp values found by gradient descent on what serving will do,
  x' = x + Σ (v − f) W_dec over active features: the probability of completing a listed word, plus a
  KL penalty on everything else.

Tokenizers split rare words (``Ġf|uck``), so what completes a listed word depends on the token before;
``Completions`` learns from texts which pairs do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from rich.progress import track

from steerserve.lab.activations import ordinary_rows
from steerserve.lab.lexicon import Lexicon
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE

MAX_TOKENS = 48
MIN_COUNT = 3
MIN_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Right-padded texts: ``tokens[B, T]`` and ``real[B, T]``, which positions are not padding."""

    tokens: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True, eq=False)
class Completions:
    """Tokens that complete a listed word.

    Attributes:
        alone: ``[V]`` mask of tokens that do so after any token.
        after: those that do so after a given token.
    """

    alone: torch.Tensor
    after: dict[int, list[int]]

    @classmethod
    def learn(cls, model: LoadedModel, texts: Sequence[str], lexicon: Lexicon) -> Completions:
        """Tokens that are listed words; of split ones, the first pair that in ``texts`` mostly belongs to one."""
        seen: Counter[tuple[int, int]] = Counter()
        inside: Counter[tuple[int, int]] = Counter()
        words: set[tuple[int, ...]] = set()
        for text in texts:
            encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = encoded.input_ids
            seen.update(pairwise(ids))
            for start, end in lexicon.spans(text):
                pieces = [i for i, (a, b) in enumerate(encoded.offset_mapping) if a < end and start < b]
                words.add(tuple(ids[i] for i in pieces))
                inside.update(pairwise(ids[i] for i in pieces))
        telling = {pair for pair, n in inside.items() if n >= MIN_COUNT and n > MIN_SHARE * seen[pair]}
        alone = torch.zeros(model.vocab_size, dtype=torch.bool)
        alone[[word[0] for word in words if len(word) == 1]] = True
        after: dict[int, list[int]] = {}
        for word in words:
            first = next((pair for pair in pairwise(word) if pair in telling), None)
            if first is not None and not alone[first[0]] and first[1] not in after.setdefault(first[0], []):
                after[first[0]].append(first[1])
        return cls(alone, after)

    def next_mask(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, V]`` tokens that would complete a listed word after each of ``tokens`` ``[n]``."""
        mask = self.alone.repeat(len(tokens), 1)
        for row, token in enumerate(tokens.tolist()):
            mask[row, self.after.get(token, [])] = True
        return mask

    def opens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mask like ``tokens``: places whose token begins a word that may become a listed one."""
        return torch.isin(tokens, torch.tensor(sorted(self.after)))

    def completed_next(self, batch: TextBatch) -> torch.Tensor:
        """``[B, T]`` positions whose next token completes a listed word."""
        current, following = batch.tokens[:, :-1], batch.tokens[:, 1:]
        pairs = torch.tensor([(a, b) for a, tokens in self.after.items() for b in tokens], dtype=torch.long).view(-1, 2)
        codes = pairs[:, 0] * len(self.alone) + pairs[:, 1]
        hit = self.alone[following] | torch.isin(current * len(self.alone) + following, codes)
        return F.pad(hit & batch.real[:, 1:], (0, 1))


def tokenize(model: LoadedModel, texts: Sequence[str]) -> TextBatch:
    """Right-padded tokens of ``texts``, cut at ``MAX_TOKENS``."""
    encoded = model.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=MAX_TOKENS).input_ids
    rows = [torch.tensor(ids, dtype=torch.long) for ids in encoded]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, True, float(model.tokenizer.eos_token_id or 0))
    return TextBatch(tokens, torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row in rows]))


def attribute(
    model: LoadedModel, sae: SAE, texts: Sequence[str], completions: Completions, batch_size: int = 32
) -> torch.Tensor:
    """Mean effect ``[d_sae]`` of each feature on log P(completing token), per completed listed word."""
    effect = torch.zeros(sae.d_sae)
    places = 0
    for start in track(range(0, len(texts), batch_size), "attribution"):
        batch = tokenize(model, texts[start : start + batch_size])
        where = completions.completed_next(batch)
        activation, gradient = _gradient_at(model, sae, batch, where, completions)
        keep = ordinary_rows(activation) & batch.real
        f = sae.encode(activation[keep])
        effect += (f * (gradient[keep] @ sae.W_dec.T)).sum(0)
        places += int(where.sum())
    return effect / max(places, 1)


def _gradient_at(
    model: LoadedModel, sae: SAE, batch: TextBatch, where: torch.Tensor, completions: Completions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activation at the site and gradient of Σ log P(completion), ``[B, T, d]`` fp32."""
    leaf: list[torch.Tensor] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        leaf.append(x.detach().requires_grad_())
        return leaf[0]

    with transformed(model, {sae.site: watch}):
        log_probs = _log_probs(model, batch.tokens, where)
    listed = completions.next_mask(batch.tokens[where])
    objective = log_probs.masked_fill(~listed, -torch.inf).logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(objective, leaf[0])
    return leaf[0].detach().float(), gradient.float()


@dataclass(frozen=True)
class FitConfig:
    """How clamp values are fitted; ``kl_weight`` trades listed words against damage to everything else."""

    steps: int = 100
    batch_size: int = 16
    positions: int = 384
    learning_rate: float = 0.08
    kl_weight: float = 0.15
    seed: int = 0


def fit_clamps(
    model: LoadedModel,
    sae: SAE,
    features: Sequence[int],
    scale: torch.Tensor,
    harmful: Sequence[str],
    benign: Sequence[str],
    completions: Completions,
    config: FitConfig,
    report: Callable[[int, float, float], None],
) -> torch.Tensor:
    """Clamp values ``[k]`` in activation units.

    Args:
        scale: ``[k]`` natural size of each activation; values move in steps proportional to it.
        report: called with step, mean P(completion) where a listed word may be completed, and mean KL.
    """
    relative = torch.zeros(len(features), requires_grad=True)
    optimizer = torch.optim.Adam([relative], lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    clamp = _differentiable_clamp(sae, features)
    for step in range(config.steps):
        drawn = [
            pool[i]
            for pool in (harmful, benign)
            for i in torch.randint(len(pool), (config.batch_size,), generator=generator).tolist()
        ]
        batch = tokenize(model, drawn)
        where = _choose_positions(batch, completions, config.positions, generator)
        with torch.no_grad():
            before = _log_probs(model, batch.tokens, where)
        with transformed(model, {sae.site: lambda x: clamp(x, relative * scale)}):
            after = _log_probs(model, batch.tokens, where)
        listed = completions.next_mask(batch.tokens[where])
        opening = completions.opens(batch.tokens[where])
        completing = after.exp().masked_fill(~listed, 0).sum(-1)
        kl = _kl_elsewhere(before, after, listed)
        optimizer.zero_grad()
        (completing.sum() / max(int(opening.sum()), 1) + config.kl_weight * kl).backward()
        optimizer.step()
        report(step + 1, completing[opening].mean().item(), kl.item())
    return (relative * scale).detach()


def _differentiable_clamp(sae: SAE, features: Sequence[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    W_enc, b_enc, threshold, max_norm, W_dec = sae.rows(features)

    def clamp(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        pre = x.float() @ W_enc.T + b_enc
        inside = x.float().norm(dim=-1, keepdim=True) <= max_norm
        edit = torch.where((pre > threshold) & inside, values - pre, 0.0)
        return (x.float() + edit @ W_dec).to(x.dtype)

    return clamp


def _choose_positions(
    batch: TextBatch, completions: Completions, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Every place where a listed word may be completed, and as many others as ``count`` leaves."""
    weight = torch.rand(batch.tokens.shape, generator=generator) + completions.opens(batch.tokens).float()
    weight = weight.masked_fill(~batch.real, -1.0)
    cutoff = weight.flatten().topk(min(count, int(batch.real.sum()))).values[-1]
    return weight >= cutoff


def _log_probs(model: LoadedModel, tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """``[n, V]`` next-token log-probabilities at the positions ``where`` only: the vocabulary is wide."""
    hidden = model.model.base_model(tokens, use_cache=False).last_hidden_state
    logits: torch.Tensor = model.model.get_output_embeddings()(hidden[where])
    return logits.float().log_softmax(-1)


def _kl_elsewhere(before: torch.Tensor, after: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
    """Mean KL(before ‖ after) over rows ``[n, V]`` of the distributions without the ``listed`` tokens."""
    p, q = (values.masked_fill(listed, -torch.inf).log_softmax(-1) for values in (before, after))
    difference = (p - q).masked_fill(listed, 0.0)
    return (p.exp() * difference).sum(-1).mean()
