"""Which tokens complete a listed word, what each feature does to them, and clamps that lower them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from steerserve.lab.activations import activations_of, ordinary_rows
from steerserve.lab.concept_build.completions import Completions, TextBatch, tokenize
from steerserve.lab.concept_build.effects import attribute, measure_effects
from steerserve.lab.concept_build.fitting import FitConfig, fit_values
from steerserve.lab.concept_build.site_rows import SiteRows
from steerserve.lab.lexicon import Lexicon
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Op, Site, Stream

SITE = Site(1, Stream.RESID_POST)
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
    batch = tokenize(tiny, ["duck"])
    assert not learned.completed_next(batch).any()
    assert not learned.opens(batch.tokens).any()


def test_where_words_are_completed(tiny: LoadedModel, completions: Completions, token_id) -> None:
    batch = tokenize(tiny, ["x duck xy", "du"])
    marked = [[i for i, hit in enumerate(row) if hit] for row in completions.completed_next(batch).tolist()]
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
    eos = tiny.tokenizer.eos_token_id
    ends = Completions(torch.arange(tiny.vocab_size) == eos, {})
    batch = tokenize(tiny, ["longer text", "x"])
    assert batch.tokens[1].tolist() == [token_id("x"), *[eos] * 10]
    assert batch.real.sum(1).tolist() == [11, 1]
    assert not ends.completed_next(batch).any()


def test_texts_are_cut_to_one_length(tiny: LoadedModel) -> None:
    assert tokenize(tiny, ["word " * 100, "x"]).tokens.shape == (2, 48)


def mean_log_probability(
    model: LoadedModel, batch: TextBatch, completions: Completions, edit: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """Mean over the places of log P(some completing token), from full logits and plain loops."""
    with torch.no_grad(), transformed(model, {SITE: edit}):
        log_probs = model.model(batch.tokens, use_cache=False).logits.double().log_softmax(-1)
    total, places = 0.0, 0
    for row, position in completions.completed_next(batch).nonzero().tolist():
        mask = completions.next_mask(batch.tokens[row, position].view(1))[0]
        total += log_probs[row, position, mask].logsumexp(0).item()
        places += 1
    return total / places


def test_attribution_is_the_derivative_of_the_log_probability(
    tiny: LoadedModel, random_sae: SAE, completions: Completions
) -> None:
    """Scaling a feature by 1 ± ε moves log P(completing token) by ± ε times its effect: same sign, same size."""
    batch = tokenize(tiny, TEXTS)
    (attribution,) = attribute(tiny, [random_sae], TEXTS, completions)
    effect = attribution.effect
    x = activations_of(tiny, batch.tokens, (SITE,))[SITE]
    keep = ordinary_rows(x) & batch.real
    f = random_sae.encode(x) * keep[..., None]
    measured = torch.zeros(random_sae.d_sae)
    for j in range(random_sae.d_sae):
        step = 0.01 * f[..., j, None] * random_sae.W_dec[j]
        up = mean_log_probability(tiny, batch, completions, lambda x, step=step: x + step)
        down = mean_log_probability(tiny, batch, completions, lambda x, step=step: x - step)
        measured[j] = (up - down) / 0.02
    assert (measured > 0.01).sum() > 3
    assert (measured < -0.01).sum() > 3
    torch.testing.assert_close(effect, measured, rtol=0.02, atol=2e-3)
    torch.testing.assert_close(attribution.max_activation, f.flatten(0, 1).amax(0))
    assert attribution.by_text.shape == (len(TEXTS), random_sae.d_sae)
    assert not attribution.by_text[4].any(), "no word in the last text"


def test_attribution_sums_over_batches(tiny: LoadedModel, random_sae: SAE, completions: Completions) -> None:
    """Mean per completed word, however the texts are batched, as long as all rows are ordinary."""
    (once,) = attribute(tiny, [random_sae], TEXTS, completions)
    (thrice,) = attribute(tiny, [random_sae], TEXTS * 3, completions, batch_size=5)
    torch.testing.assert_close(thrice.effect, once.effect)


def test_several_saes_are_attributed_at_once(tiny: LoadedModel, random_sae: SAE, completions: Completions) -> None:
    early = replace(random_sae, site=Site(0, Stream.RESID_POST))
    both = attribute(tiny, [early, random_sae], TEXTS, completions)
    for one, sae in zip(both, [early, random_sae], strict=True):
        (alone,) = attribute(tiny, [sae], TEXTS, completions)
        torch.testing.assert_close(one.effect, alone.effect)
    assert not torch.equal(both[0].effect, both[1].effect)


def test_measured_effects_are_what_each_edit_does(tiny: LoadedModel, random_sae: SAE, completions: Completions) -> None:
    rows = rows_of(random_sae)
    value = torch.full((16,), -3.0)
    texts = [TEXTS[i % 4 : i % 4 + 2] for i in range(16)]
    changes = measure_effects(tiny, rows, Op.CLAMP, value, texts, completions)
    for index in range(16):
        batch = tokenize(tiny, texts[index])
        edit = clamped(random_sae, [index], value[:1])
        before, after = (mean_log_probability(tiny, batch, completions, each) for each in (lambda x: x, edit))
        assert changes[index].item() == pytest.approx(after - before, abs=1e-4)
    assert (changes < -0.05).any()
    assert (changes > 0.05).any()


def completion_probability(
    model: LoadedModel, completions: Completions, edit: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """Mean P(some completing token) after a token that opens a listed word."""
    batch = tokenize(model, TEXTS)
    with torch.no_grad(), transformed(model, {SITE: edit}):
        p = model.model(batch.tokens, use_cache=False).logits.softmax(-1)
    where = completions.opens(batch.tokens) & batch.real
    return float(p[where].masked_fill(~completions.next_mask(batch.tokens[where]), 0).sum(-1).mean())


def clamped(sae: SAE, features: list[int], value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The clamp as it is served: f' = value where f > 0."""

    def edit(x: torch.Tensor) -> torch.Tensor:
        f = sae.encode(x)[..., features]
        return x + torch.where(f > 0, value - f, 0.0) @ sae.W_dec[features]

    return edit


def rows_of(sae: SAE) -> SiteRows:
    return SiteRows.of_sae(sae, list(range(16)), torch.full((16,), 2.0))


def fit(model: LoadedModel, sae: SAE, completions: Completions, config: FitConfig) -> tuple[torch.Tensor, list[float]]:
    probability: list[float] = []
    (value,) = fit_values(
        model, [rows_of(sae)], Op.CLAMP, False, (TEXTS[:4], TEXTS[4:]), completions, config,
        lambda step, completing, kl: probability.append(completing),
    )  # fmt: skip
    return value, probability


def test_fitted_clamps_lower_the_probability_of_the_words(
    tiny: LoadedModel, random_sae: SAE, completions: Completions
) -> None:
    value, progress = fit(tiny, random_sae, completions, FitConfig(steps=40, kl_weight=0.0))
    assert len(progress) == 40
    assert torch.isfinite(value).all()
    assert not value.requires_grad
    assert (value != 0).any()
    before = completion_probability(tiny, completions, lambda x: x)
    blocked = completion_probability(tiny, completions, clamped(random_sae, list(range(16)), torch.zeros(16)))
    after = completion_probability(tiny, completions, clamped(random_sae, list(range(16)), value))
    assert after < 0.7 * min(before, blocked)


def test_a_fit_follows_from_its_seed(tiny: LoadedModel, random_sae: SAE, completions: Completions) -> None:
    config = FitConfig(steps=3)
    assert torch.equal(fit(tiny, random_sae, completions, config)[0], fit(tiny, random_sae, completions, config)[0])
    other = fit(tiny, random_sae, completions, replace(config, seed=1))[0]
    assert not torch.equal(other, fit(tiny, random_sae, completions, config)[0])


def test_the_penalty_holds_everything_else_in_place(
    tiny: LoadedModel, random_sae: SAE, completions: Completions
) -> None:
    """With a heavier KL penalty the model is changed less."""

    def divergence(kl_weight: float) -> float:
        value, _ = fit(tiny, random_sae, completions, FitConfig(steps=30, kl_weight=kl_weight))
        batch = tokenize(tiny, TEXTS)
        with torch.no_grad():
            before = tiny.model(batch.tokens).logits.log_softmax(-1)
            with transformed(tiny, {SITE: clamped(random_sae, list(range(16)), value)}):
                after = tiny.model(batch.tokens).logits.log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1)[batch.real].mean())

    assert divergence(10.0) < 0.7 * divergence(0.0)


def test_operands_of_several_sites_are_fitted_together(
    tiny: LoadedModel, random_sae: SAE, completions: Completions
) -> None:
    """Raised everywhere, to write the words more often; each site moves, and both together do more than one."""
    early = replace(random_sae, site=Site(0, Stream.RESID_POST))
    rows = [rows_of(early), rows_of(random_sae)]

    def raised(parts: list[SiteRows]) -> float:
        values = fit_values(
            tiny, parts, Op.ADD, True, (TEXTS,), completions, FitConfig(steps=25, kl_weight=0.0), lambda *_: None
        )
        assert all((value != 0).any() for value in values)
        edits = {
            part.site: partial(part.edited, op=Op.ADD, value=value) for part, value in zip(parts, values, strict=True)
        }
        batch = tokenize(tiny, TEXTS)
        with torch.no_grad(), transformed(tiny, edits):
            p = tiny.model(batch.tokens, use_cache=False).logits.softmax(-1)[batch.real]
        return float(p.masked_fill(~completions.next_mask(batch.tokens[batch.real]), 0).sum(-1).mean())

    plain = completion_probability(tiny, completions, lambda x: x)
    one, both = raised(rows[1:]), raised(rows)
    assert plain * 2 < one < both
