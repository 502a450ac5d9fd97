"""The methods a card compares. Each is a family of treatments with one knob, or without any.

Whatever a method learns it learns from train texts, and the ban-list from the selection lemmas; its knob, and its
variant if it has several, are chosen on validation texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jinja2.exceptions import TemplateError

from steerserve.lab.concept_eval.caps import cap_pack
from steerserve.lab.concept_eval.contrast import Contrast, probe_scores
from steerserve.lab.concept_eval.prompts import opening, rendered_turn
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.concept_eval.trial import Direction
from steerserve.lab.lexicon import Lexicon
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.packs import ConceptPack, PackTensors
from steerserve.types import DirectionTarget, FloatArray, Gate, Intervention, Op, Site

BAN = -10.0
"""Leaves a banned token e^-10 of its probability; a harder ban bans no more, but its KL has no bound."""
GATE_QUANTILES = (0.9, 0.99)
"""Shares of negative train tokens at which the gate of probe-gated steering stays shut; validation chooses."""
ROWS_AT_ONCE = 4096
"""Of activations that are encoded by a whole SAE."""
RARE = 1e-5
"""A piece of a split word is banned if at most this share of negative train tokens is that piece."""


@dataclass(frozen=True)
class Knob:
    """What a method is tuned by: KL is 0 at 0 and rises. ``start`` is a natural first value."""

    meaning: str
    start: float
    largest: float


@dataclass(frozen=True, eq=False)
class Method:
    """``treatment(knob)``; methods of equal ``name`` are variants of which validation takes one."""

    name: str
    variant: str
    treatment: Callable[[float], Treatment]
    knob: Knob | None = None


POLICY = "policy"
FEATURES = "its SAE features alone"
DIRECTIONS = "its directions alone"
MEANS = "difference of means"
GATED = "probe-gated steering"
RANDOM = "random features"
PROMPT = "prompt instruction"
TOKENS = "token list"
NOTHING = "no-op"


def policy(model: LoadedModel, pack: ConceptPack) -> Method:
    """The pack; its knob multiplies every edit, so that 0 is the model itself and 1 the pack as it serves."""
    knob = Knob("multiple of the calibrated edit", 1.0, 64.0)
    return Method(POLICY, str(pack.card.policy.op), lambda strength: Treatment.policy(model, pack, strength), knob)


def parts(model: LoadedModel, pack: ConceptPack) -> list[Method]:
    """What SAE features and plain directions do by themselves, where the policy edits both."""
    features = pack.tensors.feature_ids >= 0
    kinds = {FEATURES: pack.tensors.edited & features, DIRECTIONS: pack.tensors.edited & ~features}
    if not all(rows.any() for rows in kinds.values()):
        return []
    return [_part(model, pack, name, rows) for name, rows in kinds.items()]


def _part(model: LoadedModel, pack: ConceptPack, name: str, rows: npt.NDArray[np.bool_]) -> Method:
    part = replace(pack, tensors=replace(pack.tensors, edited=rows))
    return Method(name, f"{rows.sum()} of {pack.tensors.edited.sum()} rows", lambda _: Treatment.policy(model, part))


def no_op(model: LoadedModel, pack: ConceptPack) -> Method:
    """The pack's policy with edits of size 0: whatever it changes is an error of measurement."""
    return Method(NOTHING, "edits of size 0", lambda _: Treatment.policy(model, pack, 0.0))


def difference_of_means(model: LoadedModel, contrast: Contrast, direction: Direction, max_norm: float) -> Method:
    """Cap the projection on mean positive − mean negative; to amplify, add the unit direction everywhere."""
    difference = contrast.difference_of_means()
    length = float(np.linalg.norm(difference))
    unit: FloatArray = difference / length
    if direction is Direction.AMPLIFY:
        target = DirectionTarget(contrast.site, unit)

        def add(knob: float) -> Treatment:
            return Treatment.interventions(model, Intervention(target, Op.ADD, value=knob))

        return Method(MEANS, f"added at {contrast.site}", add, Knob("length added", length, 1000 * length))
    positive, negative = probe_scores(contrast, unit)
    top, spread = float(max(positive.max(), negative.max())), float(negative.std())

    def cap(knob: float) -> Treatment:
        pack = cap_pack(model, contrast.site, unit, max_norm, top - knob * spread, top)
        return Treatment(Catalog(model, {}, {pack.name: pack}), policies=(pack.name,))

    meaning = "cap below the largest projection seen, in standard deviations of negative tokens"
    return Method(MEANS, f"cap at {contrast.site}", cap, Knob(meaning, (top - float(positive.mean())) / spread, 200.0))


def probe_gated(model: LoadedModel, contrast: Contrast, direction: Direction) -> list[Method]:
    """Subtract the unit difference of means where a probe sees the concept; to amplify, add it where it does not."""
    probe, difference = contrast.probe(), contrast.difference_of_means()
    sign = 1.0 if direction is Direction.SUPPRESS else -1.0
    _, negative = probe_scores(contrast, probe)
    length = float(np.linalg.norm(difference))
    edited, read = DirectionTarget(contrast.site, difference / length), DirectionTarget(contrast.site, sign * probe)

    def gated(quantile: float) -> Method:
        gate = Gate(read, float(np.quantile(sign * negative, quantile if sign > 0 else 1 - quantile)))

        def steer(knob: float) -> Treatment:
            return Treatment.interventions(model, Intervention(edited, Op.ADD, value=-sign * knob, gate=gate))

        variant = f"gate opens on {1 - quantile if sign > 0 else quantile:.0%} of negative tokens, at {contrast.site}"
        return Method(GATED, variant, steer, Knob("length of the edit", length, 1000 * length))

    return [gated(quantile) for quantile in GATE_QUANTILES]


def random_features(
    model: LoadedModel, pack: ConceptPack, saes: Mapping[Site, SAE], seen: Mapping[Site, Contrast]
) -> Method:
    """The pack with each feature replaced by a random live one of similar density; directions by random ones."""
    impostor = replace(pack, tensors=_impostor(pack, saes, seen))
    knob = Knob("multiple of the calibrated edit, relative to the largest activation", 1.0, 4096.0)
    return Method(
        RANDOM, "same SAE, similar density", lambda strength: Treatment.policy(model, impostor, strength), knob
    )


def _impostor(pack: ConceptPack, saes: Mapping[Site, SAE], seen: Mapping[Site, Contrast]) -> PackTensors:
    rng = np.random.default_rng(0)
    tensors = replace(pack.tensors, **{name: array.copy() for name, array in vars(pack.tensors).items()})
    for index, site in enumerate(pack.sites):
        at = np.flatnonzero((tensors.site == index) & tensors.edited)
        features, directions = at[tensors.feature_ids[at] >= 0], at[tensors.feature_ids[at] < 0]
        for row in directions:
            vector = rng.normal(size=tensors.W_dec.shape[1])
            unit = (vector / np.linalg.norm(vector)).astype(np.float32)
            tensors.W_dec[row] = unit * np.linalg.norm(tensors.W_dec[row])
            tensors.W_enc[row] = unit * np.linalg.norm(tensors.W_enc[row])
        if len(features):
            _replace_features(tensors, features, saes[site], seen[site], rng)
    return tensors


def _replace_features(
    tensors: PackTensors,
    rows: np.ndarray[tuple[int], np.dtype[np.intp]],
    sae: SAE,
    seen: Contrast,
    rng: np.random.Generator,
) -> None:
    """Each row's feature by one of the 20 live ones nearest in density that are neither the pack's nor taken."""
    density, largest = _activity(sae, torch.cat([seen.positive, seen.negative]))
    free = density > 0
    free[tensors.feature_ids[tensors.feature_ids >= 0]] = False
    chosen = []
    for row in rows:
        distance = np.abs(np.log(density + 1e-9) - np.log(density[tensors.feature_ids[row]] + 1e-9))
        distance[~free] = np.inf
        pick = int(rng.choice(np.argsort(distance, kind="stable")[: min(20, int(free.sum()))]))
        free[pick] = False
        chosen.append(pick)
    W_enc, b_enc, threshold, max_norm, W_dec = (part.numpy() for part in sae.rows(chosen))
    tensors.value[rows] *= largest[chosen] / tensors.max_activation[rows]
    tensors.W_enc[rows], tensors.b_enc[rows], tensors.threshold[rows] = W_enc, b_enc, threshold
    tensors.max_norm[rows], tensors.W_dec[rows] = max_norm, W_dec
    tensors.max_activation[rows], tensors.feature_ids[rows] = largest[chosen], chosen


def _activity(sae: SAE, rows: torch.Tensor) -> tuple[FloatArray, FloatArray]:
    """``[d_sae]`` share of ``rows`` ``[n, d_in]`` at which each feature is active, and its largest activation."""
    count, largest = torch.zeros(sae.d_sae), torch.zeros(sae.d_sae)
    for part in rows.split(ROWS_AT_ONCE):
        f = sae.encode(part)
        count, largest = count + (f > 0).sum(0), largest.maximum(f.amax(0))
    return (count / len(rows)).numpy(), largest.numpy()


def instructions(model: LoadedModel, text: str, chat: bool) -> list[Method]:
    """The instruction before the text, and as a system message if the model's chat template knows one.

    With ``chat`` prompts are user's turns, which it becomes part of. Before benign text it stands in either case; a
    system message is there followed by a user who asks for a text.
    """
    tokenizer, before = model.tokenizer, f"{text}\n\n"
    plain = replace(Treatment.none(model), prefix=tuple(tokenizer(before).input_ids))
    if chat:
        plain = replace(plain, opening=(opening(model), opening(model, instruction=before)))
    methods = [Method(PROMPT, "in the user's turn" if chat else "as plain text", lambda _: plain)]
    if not tokenizer.chat_template:
        return methods
    try:
        rendered = rendered_turn(model, "Write a text.", system=text)
    except TemplateError:  # such as Gemma 2's, which refuses a system message
        return methods
    system = replace(Treatment.none(model), prefix=tuple(tokenizer(rendered, add_special_tokens=False).input_ids))
    if chat:
        system = replace(system, opening=(opening(model), opening(model, system=text)))
    return [*methods, Method(PROMPT, "as a system message", lambda _: system)]


def token_list(model: LoadedModel, words: Lexicon, negative: Sequence[str], direction: Direction) -> Method:
    """Logits of the listed words' tokens: banned, or to amplify raised by the knob."""
    tokens = listed_tokens(model, words, negative)
    if direction is Direction.AMPLIFY:
        knob = Knob("added to the logits", 1.0, 100.0)
        return Method(TOKENS, f"{len(tokens)} tokens", lambda bias: _biased(model, tokens, bias), knob)
    return Method(TOKENS, f"{len(tokens)} tokens banned", lambda _: _biased(model, tokens, BAN))


def _biased(model: LoadedModel, tokens: Sequence[int], bias: float) -> Treatment:
    return replace(Treatment.none(model), logit_bias=dict.fromkeys(tokens, bias))


def listed_tokens(model: LoadedModel, words: Lexicon, negative: Sequence[str]) -> list[int]:
    """Tokens that are a listed word, and of each word that is split its rarest piece, if other text hardly has it."""
    tokenizer = model.tokenizer
    tokens = {i for i in range(model.vocab_size) if _is_word(str(tokenizer.decode([i])), words)}
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in negative]
    counts = np.bincount([token for ids in encoded for token in ids], minlength=model.vocab_size)
    for form in words.forms:
        for spelling in (form, form.capitalize(), form.upper()):
            for text in (spelling, f" {spelling}"):
                pieces = tokenizer(text, add_special_tokens=False).input_ids
                rarest = min(pieces, key=lambda piece: counts[piece])
                if not tokens.intersection(pieces) and counts[rarest] <= RARE * counts.sum():
                    tokens.add(rarest)
    return sorted(tokens)


def _is_word(token: str, words: Lexicon) -> bool:
    return token.strip().lower() in words.forms
