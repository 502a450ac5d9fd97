"""What features do to the next-token distribution, measured through the model.

* ``output_scores``: does amplifying a feature make the model say what the logit lens says it would? (Arad, Mueller and
  Belinkov 2025, "SAEs Are Good for Steering – If You Select the Right Features".) After a neutral prompt, at its last
  position, f += 10 · (the largest activation there). With r the smallest rank (from 0) and p the largest probability
  that any of the feature's 20 top lens tokens then has, the score is (1 − r/|V|) · p.
* ``clamping_effects``: at positions drawn at random from those where the feature fires, what clamping it to 0 and to
  its largest activation changes. As in serving, the edit is Δ = (v − f) W_dec, at that position alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.progress import track

from steerserve.lab.features.lens import RankedTokens
from steerserve.lab.features.probe import Prober, probing
from steerserve.lab.features.scan import Scan
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE

NEUTRAL_PROMPT = "From my experience,"
AMPLIFICATION = 10.0
LENS_TOKENS = 20
MAX_PROBES = 256
MAX_POSITIONS = 4
NUM_CHANGED = 10


@torch.inference_mode()
def output_scores(model: LoadedModel, sae: SAE, features: torch.Tensor, lens: RankedTokens) -> torch.Tensor:
    """Output scores ``[F]`` of ``features`` ``[F]``, whose top tokens by the logit lens are ``lens``."""
    tokens = torch.tensor(model.tokenizer(NEUTRAL_PROMPT).input_ids)
    scores = []
    with probing(model, sae, len(tokens), MAX_PROBES) as prober:
        x = prober.run(tokens).x[-1]
        amplified = AMPLIFICATION * sae.encode(x).max() * edit_scale(sae, x)
        parts = zip(features.split(MAX_PROBES), lens.ids[:, :LENS_TOKENS].split(MAX_PROBES), strict=True)
        for chosen, lens_ids in track(list(parts), "output scores"):
            last = torch.full((len(chosen),), len(tokens) - 1)
            log_probs = prober.probe(last, amplified * sae.W_dec[chosen])
            best = log_probs.gather(1, lens_ids).amax(1)
            rank = (log_probs > best[:, None]).sum(1)
            scores.append((1 - rank / log_probs.shape[1]) * best.exp())
    return torch.cat(scores)


def edit_scale(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """``[..., 1]`` what one unit of a feature's activation is worth at ``x`` ``[..., d_in]``, in rows of ``W_dec``."""
    x = x.to(sae.W_enc.dtype)
    if sae.normalises and sae.out_site == sae.site:
        return sae.normalisation.of(x)[2]
    return torch.ones_like(x[..., :1])


@dataclass
class Effect:
    """What clamping one feature to one value did, over the positions where it was tried.

    Attributes:
        kl: KL(clean ‖ clamped) of the next-token distribution, in nats, of each position.
        top_token: change of the log-probability of what was the most likely token, of each position.
        change: change of each token's probability, summed over positions, of the ``NUM_CHANGED`` tokens that rose
            and the ``NUM_CHANGED`` that fell most at each position.
    """

    kl: list[float] = field(default_factory=list)
    top_token: list[float] = field(default_factory=list)
    change: Counter[int] = field(default_factory=Counter)


@torch.inference_mode()
def clamping_effects(model: LoadedModel, sae: SAE, scan: Scan) -> list[tuple[Effect, Effect]]:
    """For every feature of ``scan`` the effect of clamping it to 0, and to its largest activation."""
    effects = [(Effect(), Effect()) for _ in scan.features]
    chosen = choose_positions(scan)
    with probing(model, sae, scan.contexts.shape[1], MAX_PROBES) as prober:
        for context, places in track(chosen.items(), "clamping"):
            _measure(prober, sae, scan, scan.contexts[context], places, effects)
    return effects


def choose_positions(scan: Scan, seed: int = 0) -> dict[int, list[tuple[int, int]]]:
    """By context the (index into ``scan.features``, position) to clamp: ``MAX_POSITIONS`` of a feature, if it has them.

    They are of different contexts, drawn from the feature's random sample. To run as few contexts as possible, all
    features take those that come first in one random order.
    """
    num_contexts, length = scan.contexts.shape
    order = torch.randperm(num_contexts, generator=torch.Generator().manual_seed(seed))
    chosen: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for feature, positions in enumerate(scan.sample.position.tolist()):
        of_context = {position // length: position % length for position in positions if position >= 0}
        for context in sorted(of_context, key=lambda context: int(order[context]))[:MAX_POSITIONS]:
            chosen[context].append((feature, of_context[context]))
    return dict(chosen)


def _measure(
    prober: Prober,
    sae: SAE,
    scan: Scan,
    tokens: torch.Tensor,
    places: Sequence[tuple[int, int]],
    effects: list[tuple[Effect, Effect]],
) -> None:
    clean = prober.run(tokens)
    f, scale = sae.encode(clean.x), edit_scale(sae, clean.x)
    for part in torch.tensor(places).split(MAX_PROBES):
        index, position = part.T
        ids = scan.features[index]
        now = f[position, ids]
        before = clean.log_probs[position]
        for which, value in enumerate((torch.zeros_like(now), scan.largest[index])):
            edits = ((value - now)[:, None] * scale[position]) * sae.W_dec[ids]
            _record([effects[i][which] for i in index.tolist()], before, prober.probe(position, edits))


def _record(effects: list[Effect], before: torch.Tensor, after: torch.Tensor) -> None:
    """Add one position to each of K effects: log-probabilities ``[K, V]`` ``before`` and ``after``."""
    p, change = before.exp(), after.exp() - before.exp()
    kl = (p * (before - after)).sum(1).clamp(min=0)
    top = before.argmax(1, keepdim=True)
    top_change = (after - before).gather(1, top)[:, 0]
    moved = torch.cat([change.topk(NUM_CHANGED, 1).indices, change.topk(NUM_CHANGED, 1, largest=False).indices], 1)
    columns = (kl.tolist(), top_change.tolist(), moved.tolist(), change.gather(1, moved).tolist())
    for effect, kl_here, top_here, tokens, changes in zip(effects, *columns, strict=True):
        effect.kl.append(kl_here)
        effect.top_token.append(top_here)
        effect.change.update(dict(zip(tokens, changes, strict=True)))
