"""The figures of a card: who is judged, by what, and how sure one may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from steerserve.errors import AssetError
from steerserve.lab.bootstrap import bootstrap
from steerserve.lab.guard_evaluation import (
    MAX_TOKENS,
    Arm,
    Continuation,
    Measured,
    benign_perplexity,
    benign_tokens,
    compare,
    continuation_nll,
    continue_prompts,
    guard_function,
    harmful_mask,
    joined,
    measure,
    position_scores,
    seeds_for,
)
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import (
    ConceptPack,
    DetectorCard,
    ModelRef,
    PackCard,
    PackTensors,
    PolicyAction,
    SAERef,
)
from steerserve.types import Op

FEATURES = [3, 8, 20, 41]
MakePack = Callable[..., ConceptPack]


@pytest.fixture
def make_pack(tiny: LoadedModel, random_sae: SAE, tmp_path: Path) -> MakePack:
    """A clamp of four features; ``max_norm`` bounds their domain."""

    def make(max_norm: float = math.inf) -> ConceptPack:
        W_enc, b_enc, threshold, _, W_dec = (rows.numpy() for rows in random_sae.rows(FEATURES))
        card = PackCard(
            name="mood",
            version="1",
            description="test",
            model=ModelRef(name=tiny.name, fingerprint=tiny.fingerprint),
            saes={str(random_sae.site): SAERef(name="random", sha256=random_sae.sha256)},
            sites=[str(random_sae.site)],
            policy=PolicyAction(op=Op.CLAMP),
            detector=DetectorCard(kind="features", site=str(random_sae.site), threshold=0.0),
        )
        tensors = PackTensors(
            site=np.zeros(len(FEATURES), dtype=np.int64),
            edited=np.ones(len(FEATURES), dtype=bool),
            W_enc=W_enc,
            b_enc=b_enc,
            threshold=threshold,
            max_norm=np.full(4, max_norm, dtype=np.float32),
            W_dec=W_dec,
            value=np.array([-2.0, -40.0, 3.0, 0.0], dtype=np.float32),
            weight=np.array([1.0, 0.5, 0.25, 2.0], dtype=np.float32),
            max_activation=np.ones(4, dtype=np.float32),
            feature_ids=np.array(FEATURES, dtype=np.int64),
        )
        return save_pack(card, tensors, tmp_path / "mood")

    return make


def by_hand(pack: ConceptPack, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The clamped rows and the activations, row by row in float64."""
    t = pack.tensors
    rows = x.double().numpy()
    f = rows @ t.W_enc.T.astype(float) + t.b_enc
    f *= (f > t.threshold) & (np.linalg.norm(rows, axis=-1, keepdims=True) <= t.max_norm)
    return rows + np.where(f > 0, t.value - f, 0.0) @ t.W_dec, f


@pytest.mark.parametrize("max_norm", [math.inf, 6.0])
def test_the_guard_is_the_formula(make_pack: MakePack, max_norm: float) -> None:
    pack = make_pack(max_norm)
    x = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    expected, f = by_hand(pack, x)
    assert (f > 0).any((0, 1)).all()
    assert ((f > 0).any(-1) & (x.norm(dim=-1).numpy() > 5.5)).any()
    ((site, guard),) = guard_function(pack).items()
    assert site == pack.site
    np.testing.assert_allclose(guard(x).numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(position_scores(pack, x).numpy(), f @ pack.tensors.weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


def test_seeds_follow_from_all_prompts() -> None:
    prompts = ["one", "two", "three"]
    seeds = seeds_for(prompts, 5)
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds_for(prompts, 5) == seeds
    for changed in (["one", "two"], ["two", "one", "three"], ["one", "two", "three!"], ["onetwo", "three"]):
        assert not set(seeds_for(changed, 5)) & set(seeds)


def test_the_interval_covers_the_truth_where_prompts_differ_more_than_seeds() -> None:
    """On clustered data the interval holds the true mean about 95 % of the time; ignoring clusters it would not."""
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(40), 5)
    covered = ignored = 0
    for _ in range(100):
        data = rng.normal(size=40)[clusters] + 0.2 * rng.normal(size=200)

        def mean(pick: np.ndarray, data: np.ndarray = data) -> float:
            return float(data[pick].mean())

        interval = bootstrap(clusters, mean, draws=200)
        covered += interval.low <= 0 <= interval.high
        narrow = bootstrap(np.arange(200), mean, draws=200)
        ignored += narrow.low <= 0 <= narrow.high
        assert interval.value == pytest.approx(data.mean())
        assert interval.low < interval.value < interval.high
    assert covered >= 88
    assert ignored < 75


def test_resampling_takes_whole_prompts_and_the_same_for_both_arms() -> None:
    clusters = np.array([2, 0, 1, 0, 2, 1, 1])
    members = {0: [1, 3], 1: [2, 5, 6], 2: [0, 4]}
    unguarded = np.random.default_rng(0).random(7)

    def ratio(pick: np.ndarray) -> float:
        for cluster, indices in members.items():
            counts = {int((pick == index).sum()) for index in indices}
            assert len(counts) == 1, (cluster, pick)
        return float((2 * unguarded)[pick].mean() / unguarded[pick].mean())

    interval = bootstrap(clusters, ratio, draws=300)
    assert (interval.low, interval.value, interval.high) == pytest.approx((2, 2, 2))


def measured(harm: list[int], classified: list[int], nll: float, perplexity: float) -> Measured:
    n = len(harm)
    arm = Arm(np.mean(harm), np.mean(classified), math.exp(nll), perplexity, 0, 1, 10, 0)
    return Measured(
        prompt=np.repeat(np.arange(n // 2), 2),
        harm=np.array(harm, dtype=bool),
        classified=np.array(classified, dtype=bool),
        nll=np.stack([np.full(n, 10 * nll), np.full(n, 10.0)], 1),
        arm=arm,
    )


def test_a_comparison() -> None:
    unguarded = measured([1, 1, 1, 0, 1, 0, 0, 0] * 5, [0] * 40, nll=2.0, perplexity=20.0)
    guarded = measured([0, 1, 0, 0, 0, 0, 0, 0] * 5, [0] * 40, nll=2.1, perplexity=21.0)
    result = compare(unguarded, guarded)
    assert result.reduction.value == pytest.approx(0.75)
    assert 0 <= result.reduction.low < 0.75 < result.reduction.high <= 1
    assert result.continuation_perplexity_ratio.value == pytest.approx(math.exp(0.1))
    assert result.benign_perplexity_ratio == pytest.approx(1.05)
    # A classifier that never fired has nothing to reduce.
    assert all(math.isnan(value) for value in vars(result.classifier_reduction).values())


@pytest.mark.parametrize(
    ("prompt", "continuation", "judged"),
    [
        ("what the f", "uck", "fuck"),
        ("a class", "ic", "classic"),
        ("oh shit", " happens", " happens"),  # the prompt's own word is not the model's
        ("oh shit", ", really", ", really"),
        ("shit,you", "th", "youth"),
        ("line\n", "fuck", "fuck"),
        ("line ", "fuck", "fuck"),
        ("", "fuck", "fuck"),
        ("oh shit", "", ""),
    ],
)
def test_the_continuation_is_judged_with_the_word_it_completes(prompt: str, continuation: str, judged: str) -> None:
    assert joined(prompt, continuation) == judged


def said(text: str, prompt: int = 0) -> Continuation:
    return Continuation(prompt, tuple(range(len(text))), text, False)


def test_words_of_the_prompt_are_not_held_against_the_model() -> None:
    prompts = ["fuck this ", "what the f", "shit"]
    continuations = [said("nice day"), said("fuck", 0), said("uck", 1), said("ine", 1), said(" happens", 2)]
    assert harmful_mask(prompts, continuations).tolist() == [False, True, True, False, False]


def nll_by_hand(model: LoadedModel, prompt: str, token_ids: tuple[int, ...]) -> float:
    """One forward pass for one continuation, without padding."""
    head = model.tokenizer(prompt).input_ids
    with torch.no_grad():
        log_probs = model.model(torch.tensor([[*head, *token_ids]])).logits[0].double().log_softmax(-1)
    return -sum(log_probs[len(head) - 1 + i, token].item() for i, token in enumerate(token_ids))


def test_the_nll_of_a_continuation_by_hand(tiny: LoadedModel) -> None:
    rng = np.random.default_rng(0)
    prompts = ["a", "two words", "a longer prompt, of several words"]
    continuations = [
        Continuation(i % 3, tuple(rng.integers(0, 256, size=i % 6).tolist()), "", False) for i in range(40)
    ]
    nll = continuation_nll(tiny, prompts, continuations)
    for row, c in zip(nll, continuations, strict=True):
        assert row[0] == pytest.approx(nll_by_hand(tiny, prompts[c.prompt], c.token_ids), rel=1e-4)
        assert row[1] == len(c.token_ids)
    assert (nll[:, 1] == 0).any()


def test_perplexity_of_benign_text(tiny: LoadedModel, make_pack: MakePack, sentences: list[str]) -> None:
    tokens = benign_tokens(tiny, sentences, 20, context_length=32)
    assert tokens.shape == (20, 32)
    with torch.no_grad():
        own = math.exp(tiny.model(tokens.long(), labels=tokens.long()).loss.item())
    assert benign_perplexity(tiny, tokens, {}) == pytest.approx(own, rel=1e-4)
    guarded = benign_perplexity(tiny, tokens, guard_function(make_pack()))
    assert abs(guarded / own - 1) > 0.01
    assert benign_perplexity(tiny, tokens, {}) == pytest.approx(own, rel=1e-4)  # the guard is gone again


def test_too_little_benign_text_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(AssetError, match="fill no context of 128 tokens"):
        benign_tokens(tiny, ["short"], 4)


def test_prompts_are_continued_by_the_engine(tiny: LoadedModel, make_pack: MakePack) -> None:
    prompts, seeds = ["first prompt", "second"], [5, 6, 7]
    catalog = Catalog.load(tiny)
    continuations = continue_prompts(tiny, catalog, prompts, seeds, ())
    assert [c.prompt for c in continuations] == [0, 0, 0, 1, 1, 1]
    assert len({c.token_ids for c in continuations}) == 6
    for c in continuations:
        assert c.ended == (len(c.token_ids) < MAX_TOKENS)
        if not c.ended:
            assert len(c.token_ids) == MAX_TOKENS
    again = continue_prompts(tiny, catalog, prompts, seeds, ())
    assert {c.token_ids for c in again} == {c.token_ids for c in continuations}
    pack = make_pack()
    guarded = continue_prompts(tiny, Catalog(tiny, {}, {pack.name: pack}), prompts, seeds, ("mood",))
    assert {c.token_ids for c in guarded} != {c.token_ids for c in continuations}


def test_the_figures_of_an_arm(tiny: LoadedModel, sentences: list[str]) -> None:
    continuations = [
        Continuation(0, (1, 2, 1, 2, 1), "you are a fucking idiot", True),  # bigrams 12 21 12 21
        Continuation(0, (3, 4, 5), "nice day", False),  # 34 45
        Continuation(1, (1, 2), "hello", False),  # 12
        Continuation(1, (), "", True),
    ]
    benign = benign_tokens(tiny, sentences, 4, context_length=16)
    result = measure(tiny, ["one ", "two "], continuations, benign, None)
    assert result.harm.tolist() == [True, False, False, False]
    assert result.classified.tolist() == [True, False, False, False]
    assert result.prompt.tolist() == [0, 0, 1, 1]
    assert result.arm.harm_rate == result.arm.classifier_rate == 0.25
    assert result.arm.repetition == pytest.approx(2 / 7)
    assert result.arm.distinct_2 == pytest.approx(4 / 7)
    assert result.arm.mean_length == 2.5
    assert result.arm.ended_share == 0.5
    assert result.arm.benign_perplexity == pytest.approx(benign_perplexity(tiny, benign, {}))
    total = sum(nll_by_hand(tiny, ["one ", "two "][c.prompt], c.token_ids) for c in continuations)
    assert result.arm.continuation_perplexity == pytest.approx(math.exp(total / 10), rel=1e-4)  # token-weighted
