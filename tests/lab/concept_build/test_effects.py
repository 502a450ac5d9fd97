"""Which tokens complete a listed word, what each feature does to them, and clamps that lower them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.concept_build.capped import capped_directions
from steerserve.lab.concept_build.completions import Completions
from steerserve.lab.concept_build.contexts import Contexts
from steerserve.lab.concept_build.effects import attribute, measure_effects
from steerserve.lab.concept_build.fitting import FitConfig, Pools, Start, fit_values
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.lab.concept_eval.continuations import continue_prompts
from steerserve.lab.concept_eval.prompts import Prompt
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.lexicon import Lexicon
from steerserve.lab.tokens import tokenize
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Op, Site, Stream

EARLY, SITE = Site(0, Stream.RESID_POST), Site(1, Stream.RESID_POST)
LEXICON = Lexicon(frozenset({"duck", "x"}))
TEXTS = ["a duck ran", "the duck, duck", "x marks it", "you duck x", "dull day"]
"""``du`` is mostly ``duck``; ``d`` alone is not."""


@pytest.fixture
def completions(tiny: LoadedModel) -> Completions:
    return Completions.learn(tiny, TEXTS, LEXICON)


def test_completions_are_learned_from_texts(tiny: LoadedModel, completions: Completions, token_id) -> None:
    """``x`` is a word by itself; of d-u-c-k, the first pair that mostly belongs to it tells the word."""
    assert completions.alone.nonzero().flatten().tolist() == [token_id("x")]
    assert completions.after == {token_id("d"): [token_id("u")]}


def test_a_pair_that_mostly_belongs_to_other_words_tells_nothing(tiny: LoadedModel, token_id) -> None:
    learned = Completions.learn(tiny, [*TEXTS, "dull dusk dunes", "dune dust"], LEXICON)
    assert learned.after == {token_id("u"): [token_id("c")]}


def test_a_word_seen_too_rarely_is_not_learned(tiny: LoadedModel) -> None:
    learned = Completions.learn(tiny, ["duck", "a duck"], LEXICON)
    assert learned.after == {}
    assert not learned.alone.any()
    batch = tokenize(tiny, ["duck"], 48)
    assert not learned.completed_next(batch.tokens, batch.real).any()
    assert not learned.opens(batch.tokens).any()


def test_where_words_are_completed(tiny: LoadedModel, completions: Completions, token_id) -> None:
    batch = tokenize(tiny, ["x duck xy", "du"], 48)
    marked = [
        [i for i, hit in enumerate(row) if hit] for row in completions.completed_next(batch.tokens, batch.real).tolist()
    ]
    assert marked == [[2, 6], [0]]  # before u of the duck, and before the second x; before u
    opened = completions.opens(batch.tokens)
    assert opened[0].nonzero().flatten().tolist() == [2]
    mask = completions.next_mask(torch.tensor([token_id("d"), token_id("a")]))
    assert mask.shape == (2, tiny.vocab_size)
    assert [row.nonzero().flatten().tolist() for row in mask] == [
        sorted([token_id("u"), token_id("x")]),
        [token_id("x")],
    ]


def test_padding_completes_nothing(tiny: LoadedModel, token_id) -> None:
    batch = tokenize(tiny, ["longer text", "x"], 48)
    assert batch.tokens[1].tolist() == [token_id("x"), *[0] * 10]
    ends = Completions(torch.arange(tiny.vocab_size) == 0, {})
    assert not ends.completed_next(batch.tokens, batch.real).any()


def contexts_of(model: LoadedModel, texts: list[str] = TEXTS, layer: int = 0) -> Contexts:
    return Contexts.of_texts(model, texts, layer)


def words_probability(
    model: LoadedModel, completions: Completions, edits: dict[Site, Callable], texts: list[str] = TEXTS
) -> float:
    """Σ P(completing token) over all real positions, from full logits in plain steps."""
    batch = tokenize(model, texts, 48)
    with torch.no_grad(), transformed(model, edits):
        p = model.model(batch.tokens, use_cache=False).logits.double().softmax(-1)[batch.real]
    return float(p.masked_fill(~completions.next_mask(batch.tokens[batch.real]), 0).sum())


def test_attribution_is_the_derivative_of_the_words_probability(
    tiny: LoadedModel, random_sae: SAE, completions: Completions
) -> None:
    """Scaling a feature by 1 ± ε moves Σ P(completing token) by ± ε times its effect: same sign, same size."""
    contexts = contexts_of(tiny)
    (attribution,) = attribute(tiny, [random_sae], contexts, completions)
    x = activations_of(tiny, contexts.tokens, (SITE,))[SITE]
    f = random_sae.encode(x) * ordinary_rows(x, contexts.real)[..., None]
    measured = torch.zeros(random_sae.d_sae)
    for j in range(random_sae.d_sae):
        step = 0.01 * f[..., j, None] * random_sae.W_dec[j]
        up, down = (
            words_probability(tiny, completions, {SITE: lambda x, step=sign * step: x + step}) for sign in (1, -1)
        )
        measured[j] = (up - down) / 0.02
    assert (measured > 0.01).sum() > 3
    assert (measured < -0.01).sum() > 3
    torch.testing.assert_close(attribution.effect, measured, rtol=0.02, atol=2e-3)
    torch.testing.assert_close(attribution.max_activation, f.flatten(0, 1).amax(0))
    assert attribution.by_context.shape == (len(TEXTS), random_sae.d_sae)
    torch.testing.assert_close(attribution.by_context.float().sum(0), attribution.effect)


def test_several_saes_are_attributed_at_once(tiny: LoadedModel, random_sae: SAE, completions: Completions) -> None:
    early = replace(random_sae, site=EARLY)
    contexts = contexts_of(tiny)
    both = attribute(tiny, [early, random_sae], contexts, completions)
    for one, sae in zip(both, [early, random_sae], strict=True):
        (alone,) = attribute(tiny, [sae], contexts, completions)
        torch.testing.assert_close(one.effect, alone.effect)
        torch.testing.assert_close(one.gradients, alone.gradients)
    assert not torch.equal(both[0].effect, both[1].effect)


@pytest.mark.parametrize("layer", [0, 1])
def test_contexts_go_on_where_their_layers_were_left(tiny: LoadedModel, completions: Completions, layer: int) -> None:
    """The cached layers change nothing, whichever rows are taken."""
    contexts = contexts_of(tiny, layer=layer)
    part = contexts.take(torch.tensor([3, 0]))
    assert part.tokens.shape == (2, 10), "cut to the longest of the two"
    log_probs = part.log_probs(tiny, part.scored)
    expected = tiny.model(part.tokens, use_cache=False).logits.log_softmax(-1)[part.real]
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)


def test_on_policy_contexts_score_what_the_model_wrote(tiny: LoadedModel) -> None:
    prompts = [Prompt(text, tuple(tiny.tokenizer(text).input_ids)) for text in ("a duck", "x")]
    contexts = Contexts.on_policy(tiny, prompts, 3, 1)
    drawn = continue_prompts(tiny, Treatment.none(tiny), prompts, [3], "again")
    for row, (prompt, continuation) in enumerate(zip(prompts, drawn, strict=True)):
        real = contexts.tokens[row, contexts.real[row]].tolist()
        assert real == [*prompt.token_ids, *continuation.token_ids]
        first = int(contexts.scored[row].nonzero()[0])
        assert first == len(prompt.token_ids) - 1, "where its first token is predicted"
        assert int(contexts.scored[row].sum()) == len(continuation.token_ids) + 1


def rows_of(sae: SAE) -> SiteRows:
    return SiteRows.of_sae(sae, list(range(16)), torch.full((16,), 2.0))


def test_measured_effects_are_what_each_edit_does(tiny: LoadedModel, random_sae: SAE, completions: Completions) -> None:
    where = torch.tensor([[i % 5, (i + 1) % 5] for i in range(16)])
    value = torch.full((16,), -3.0)
    changes = measure_effects(tiny, rows_of(random_sae), Op.CLAMP, value, contexts_of(tiny), where, completions)
    for index in range(16):
        texts = [TEXTS[i] for i in where[index]]

        def edit(x: torch.Tensor, index: int = index) -> torch.Tensor:
            f = random_sae.encode(x)[..., [index]]
            return x + torch.where(f > 0, -3.0 - f, 0.0) @ random_sae.W_dec[[index]]

        before, after = (words_probability(tiny, completions, edits, texts) for edits in ({}, {SITE: edit}))
        assert changes[index].item() == pytest.approx(math.log(after / before), abs=1e-4)
    assert (changes < -0.01).any()
    assert (changes > 0.01).any()


def start(sae: SAE) -> Start:
    return Start(rows_of(sae), torch.zeros(16), torch.full((16,), 2.0))


def fit(
    model: LoadedModel, starts: list[Start], completions: Completions, op: Op = Op.CLIP, **config: object
) -> list[tuple[SiteRows, torch.Tensor]]:
    settings = FitConfig(**{"steps": 30, "batch_size": 4, "kl_weight": 0.0, "surprisal_weight": 0.0, **config})
    pools = Pools([contexts_of(model, TEXTS[:4])], contexts_of(model, TEXTS[4:]))
    return fit_values(model, starts, op, op is Op.ADD, pools, completions, settings, lambda *_: None)


def edits_of(fitted: list[tuple[SiteRows, torch.Tensor]], op: Op) -> dict[Site, Callable]:
    return {rows.site: partial(rows.edited, op=op, value=value) for rows, value in fitted}


def test_fitted_operands_lower_the_probability_of_the_words(
    tiny: LoadedModel, random_sae: SAE, completions: Completions
) -> None:
    ((rows, value),) = fit(tiny, [start(random_sae)], completions)
    assert torch.isfinite(value).all()
    assert not value.requires_grad
    assert torch.equal(rows.W_enc, rows_of(random_sae).W_enc), "features stay what they are"
    before, blocked, after = (
        words_probability(tiny, completions, edits)
        for edits in ({}, edits_of([(rows, torch.zeros(16))], Op.CLIP), edits_of([(rows, value)], Op.CLIP))
    )
    assert after < 0.8 * min(before, blocked)


def test_a_fit_follows_from_its_seed(tiny: LoadedModel, random_sae: SAE, completions: Completions) -> None:
    (one, again, other) = (fit(tiny, [start(random_sae)], completions, steps=3, seed=seed)[0][1] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_penalty_holds_everything_else_in_place(
    tiny: LoadedModel, random_sae: SAE, completions: Completions
) -> None:
    """With a heavier KL penalty the model is changed less."""

    def divergence(kl_weight: float) -> float:
        edits = edits_of(fit(tiny, [start(random_sae)], completions, kl_weight=kl_weight), Op.CLIP)
        batch = tokenize(tiny, TEXTS, 48)
        with torch.no_grad():
            before = tiny.model(batch.tokens).logits.log_softmax(-1)
            with transformed(tiny, edits):
                after = tiny.model(batch.tokens).logits.log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1)[batch.real].mean())

    assert divergence(50.0) < 0.7 * divergence(0.0)


def test_operands_of_several_sites_are_fitted_together(
    tiny: LoadedModel, random_sae: SAE, completions: Completions
) -> None:
    """Raised everywhere, to write the words more often; each site moves, and both together do more than one."""
    starts = [start(replace(random_sae, site=EARLY)), start(random_sae)]
    probability = []
    for chosen in (starts[1:], starts):
        fitted = fit(tiny, chosen, completions, Op.ADD)
        assert all((value != 0).any() for _, value in fitted)
        probability.append(words_probability(tiny, completions, edits_of(fitted, Op.ADD)))
    plain = words_probability(tiny, completions, {})
    assert plain * 1.5 < probability[0] < probability[1]


def test_capped_directions_do_what_features_alone_do_not(
    tiny: LoadedModel, random_sae: SAE, completions: Completions
) -> None:
    (attribution,) = attribute(tiny, [random_sae], contexts_of(tiny), completions)
    capped = capped_directions(tiny, SITE, attribution.gradients, TEXTS[4:] * 10, 2, math.inf)
    torch.testing.assert_close(capped.rows.W_enc @ capped.rows.W_enc.T, torch.eye(2), rtol=1e-4, atol=1e-4)
    assert ((attribution.gradients @ capped.rows.W_enc.T).sum(0) > 0).all(), "along them, the words get likelier"
    x = activations_of(tiny, tokenize(tiny, TEXTS[4:], 48).tokens, (SITE,))[SITE][0]
    above = (x @ capped.rows.W_enc.T > capped.value).float().mean(0)
    assert (above <= 0.2).all()
    features = start(random_sae)
    joined = Start(
        features.rows.joined(capped.rows),
        torch.cat([features.value, capped.value]),
        torch.cat([features.scale, capped.scale]),
    )
    ((rows, value),) = fit(tiny, [joined], completions, direction_rate=0.02)
    assert rows.feature_ids[-2:] == (-1, -1)
    torch.testing.assert_close(rows.W_enc[-2:].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(rows.W_enc[-2:], rows.W_dec[-2:])
    assert not torch.equal(rows.W_enc[-2:], capped.rows.W_enc), "directions are fitted too"
    assert torch.equal(rows.W_enc[:16], features.rows.W_enc)
    without = edits_of(fit(tiny, [features], completions), Op.CLIP)
    assert words_probability(tiny, completions, edits_of([(rows, value)], Op.CLIP)) < words_probability(
        tiny, completions, without
    )
