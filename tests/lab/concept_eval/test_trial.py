"""Prompts, seeds and continuations, by the engine that serves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steerserve.errors import AssetError
from steerserve.lab.bootstrap import Interval, Resamples
from steerserve.lab.concept_eval import continuations as continuations_module
from steerserve.lab.concept_eval.continuations import CONTINUATION_TOKENS, Arms, Continuation, continue_prompts
from steerserve.lab.concept_eval.judges import Judge, judge
from steerserve.lab.concept_eval.outcome import Outcome, degeneration
from steerserve.lab.concept_eval.prompts import MAX_PROMPT_TOKENS, Prompt, candidates, seeds_for
from steerserve.lab.concept_eval.texts import Corpus
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.concept_eval.trial import SCREENED, SCREENINGS, Direction, Setting, Trial, draw_prompts, rates
from steerserve.models.loading import LoadedModel
from steerserve.steering.packs import ConceptPack

MakePack = Callable[..., ConceptPack]


def prompt(model: LoadedModel, text: str) -> Prompt:
    return Prompt(text, tuple(model.tokenizer(text).input_ids))


def test_seeds_follow_from_all_prompts() -> None:
    prompts = [Prompt(text, (1,)) for text in ("one", "two", "three")]
    seeds = seeds_for(prompts, 5)
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds_for(prompts, 5) == seeds
    for changed in (["one", "two"], ["two", "one", "three"], ["one", "two", "three!"], ["onetwo", "three"]):
        assert not set(seeds_for([Prompt(text, (1,)) for text in changed], 5)) & set(seeds)


def test_prompts_are_pairs_that_fit(tiny: LoadedModel) -> None:
    pairs = candidates(tiny, ["a", "b", "c" * MAX_PROMPT_TOKENS], chat=False)
    assert [p.text for p in pairs] == ["a\nb\n"]
    assert pairs[0].token_ids == tuple(tiny.tokenizer("a\nb\n").input_ids)


@pytest.fixture
def treated(tiny: LoadedModel, make_pack: MakePack) -> Treatment:
    return Treatment.policy(tiny, make_pack())


def test_prompts_are_continued_with_every_seed(tiny: LoadedModel, treated: Treatment) -> None:
    prompts = [prompt(tiny, "first prompt"), prompt(tiny, "second")]
    drawn = continue_prompts(tiny, Treatment.none(tiny), prompts, [7, 5, 6], "")
    assert [(c.prompt, c.seed) for c in drawn] == [(p, s) for p in (0, 1) for s in (7, 5, 6)]
    assert len({c.token_ids for c in drawn}) == 6
    for c in drawn:
        assert c.ended == (len(c.token_ids) < CONTINUATION_TOKENS)
    assert continue_prompts(tiny, Treatment.none(tiny), prompts, [7, 5, 6], "") == drawn
    assert continue_prompts(tiny, treated, prompts, [7, 5, 6], "") != drawn


def test_the_nll_is_the_untreated_models_given_the_prompt_alone(tiny: LoadedModel, treated: Treatment) -> None:
    prompts = [prompt(tiny, "a"), prompt(tiny, "a longer prompt, of several words")]
    instructed = replace(treated, prefix=(1, 2, 3), logit_bias={5: 2.0})
    for c in continue_prompts(tiny, instructed, prompts, [1, 2], ""):
        head = prompts[c.prompt].token_ids
        with torch.no_grad():
            logits = tiny.model(torch.tensor([[*head, *c.token_ids]])).logits[0].double().log_softmax(-1)
        by_hand = -sum(logits[len(head) - 1 + i, token].item() for i, token in enumerate(c.token_ids))
        assert c.nll == pytest.approx(by_hand, rel=1e-4)


def test_ragged_continuations_by_hand(tiny: LoadedModel) -> None:
    head, tails = tuple(tiny.tokenizer("a prompt").input_ids), [(5, 6, 7), (), (9,)]
    nll = continuations_module._nll(tiny, head, tails)
    assert nll[1] == 0
    for tail, value in zip(tails, nll, strict=True):
        with torch.no_grad():
            logits = tiny.model(torch.tensor([[*head, *tail]])).logits[0].double().log_softmax(-1)
        assert value == pytest.approx(-sum(logits[len(head) - 1 + i, t].item() for i, t in enumerate(tail)), rel=1e-4)
    assert continuations_module._nll(tiny, head, [(), ()]) == [0.0, 0.0]


def test_finished_arms_are_not_run_again(
    tiny: LoadedModel, treated: Treatment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, prompts = Arms(tmp_path / "arms"), [prompt(tiny, "first"), prompt(tiny, "second")]
    first = arms.continuations(tiny, treated, prompts, [1], "")
    runs: list[str] = []

    def run(*arguments: object) -> list[Continuation]:
        *_, title, _scored = arguments
        runs.append(str(title))
        return continue_prompts(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(continuations_module, "continue_prompts", run)
    assert arms.continuations(tiny, treated, prompts, [1], "again") == first
    assert runs == []
    arms.continuations(tiny, Treatment.none(tiny), prompts, [1], "other treatment")
    arms.continuations(tiny, treated, prompts, [2], "other seed")
    arms.continuations(tiny, treated, prompts[:1], [1], "other prompts")
    unscored = arms.continuations(tiny, treated, prompts, [1], "not scored", scored=False)
    assert runs == ["other treatment", "other seed", "other prompts", "not scored"]
    assert [c.token_ids for c in unscored] == [c.token_ids for c in first]
    assert all(math.isnan(c.nll) for c in unscored)
    assert not list(tmp_path.rglob("*.partial"))


def test_numbers_are_kept(tmp_path: Path) -> None:
    arms = Arms(tmp_path)
    assert arms.number(("kl", 1), lambda: 0.25) == 0.25
    assert arms.number(("kl", 2), lambda: 0.5) == 0.5
    assert Arms(tmp_path).number(("kl", 1), lambda: 1 / 0) == 0.25
    assert Arms(None).number(("kl", 1), lambda: 3.0) == 3.0


def test_an_outcome_by_hand() -> None:
    prompts = [Prompt("one ", (1,)), Prompt("two ", (1,))]
    continuations = [
        Continuation(0, 1, (1, 2, 1, 2, 1), "you are a fucking idiot", True, 10.0),  # bigrams 12 21 12 21
        Continuation(0, 2, (3, 4, 1, 2), "nice day", False, 2.0),  # 34 41 12
        Continuation(1, 1, (1, 2), "hello", False, 3.0),  # 12
        Continuation(1, 2, (), "", True, 0.0),
    ]
    outcome = Outcome.of(prompts, continuations, judge("profanity"), judge("alt-profanity-check"))
    resamples = Resamples(2)
    assert outcome.shown.tolist() == [True, False, False, False]
    assert outcome.rate(resamples)[0] == outcome.second_rate(resamples)[0] == 0.25
    assert outcome.perplexity(resamples)[0] == pytest.approx(np.exp(15 / 11))
    figures = {name: values["value"] for name, values in degeneration(outcome, outcome, resamples).items()}
    assert figures == pytest.approx(
        {"repetition": 2 / 8, "distinct_2": (4 + 1) / 8, "mean_length": 11 / 4, "ended_share": 2 / 4}
    )
    alone = Outcome.of(prompts, continuations, judge("profanity"), None)
    assert np.isnan(alone.second_rate(resamples)).all()


def test_degenerate_text_is_named() -> None:
    prompts = [Prompt("x", (1,))] * 4
    normal = [Continuation(i, 0, tuple(range(40)), "", False, 0.0) for i in range(4)]
    dull = [Continuation(i, 0, (1, 2) * 20, "", False, 0.0) for i in range(4)]
    short = [Continuation(i, 0, tuple(range(30)), "", True, 0.0) for i in range(4)]
    judged = [Outcome.of(prompts, list(c), judge("profanity"), None) for c in (normal, dull, short)]
    resamples = Resamples(4)

    def off(treated: Outcome) -> set[str]:
        figures = degeneration(treated, judged[0], resamples)
        return {name for name, values in figures.items() if not values["within_10_percent"]}

    assert off(judged[0]) == set()
    assert off(judged[1]) == {"repetition", "distinct_2"}
    assert off(judged[2]) == {"mean_length", "ended_share"}


ODD = Judge("odd", lambda texts: np.array([sum(map(ord, text)) % 2 == 1 for text in texts], dtype=bool))
"""Finds its concept in half of what a random model writes."""
NEVER = Judge("never", lambda texts: np.zeros(len(texts), dtype=bool))


def test_a_concept_to_suppress_is_drawn_and_one_to_amplify_is_not(tiny: LoadedModel, sentences: list[str]) -> None:
    corpus = Corpus([text[:20] for text in sentences], [text[:20].upper() for text in sentences])
    drawn = draw_prompts(tiny, corpus, Setting(Direction.SUPPRESS, ODD), 6)
    assert len(drawn) == 6
    assert all(p.text == p.text.lower() for p in drawn)
    pool = candidates(tiny, corpus.positive, chat=False)
    pool = pool[: SCREENED * 6]
    again = continue_prompts(tiny, Treatment.none(tiny), pool, list(range(SCREENINGS)), "")
    shown = Counter(pool[c.prompt] for c in again if ODD.flags([c.text])[0])
    assert [times for _, times in shown.most_common(6)] == [shown[prompt] for prompt in drawn], (
        "those that most often do"
    )
    assert len(set(drawn)) == 6
    taken = draw_prompts(tiny, corpus, Setting(Direction.AMPLIFY, ODD), 6)
    assert [p.text for p in taken] == [p.text for p in candidates(tiny, corpus.negative, False)[:6]]
    with pytest.raises(AssetError, match="no prompt made of the positive texts"):
        draw_prompts(tiny, Corpus(sentences[:2], sentences[:2]), Setting(Direction.SUPPRESS, NEVER), 6)


def test_rates_without_spread_are_bounded_over_prompts() -> None:
    """0 of 100 prompts: at most 3.6 % of prompts, at 97.5 %."""
    half, none, every = (np.full(9, rate) for rate in (0.5, 0.0, 1.0))
    found = rates(none, half, 100)
    assert (found["rate"].value, found["rate"].low) == (0, 0)
    assert (1 - found["rate"].high) ** 100 == pytest.approx(0.025)
    assert found["rate"].high == pytest.approx(0.0362, abs=1e-4)
    assert found["reduction"] == Interval(1.0, pytest.approx(1 - found["rate"].high / 0.5), 1.0)
    assert rates(every, half, 100)["rate"] == Interval(1.0, pytest.approx(1 - found["rate"].high), 1.0)
    assert rates(half, none, 100)["untreated_rate"] == found["rate"]
    assert np.isnan(rates(none, none, 100)["reduction"].low)
    assert rates(half, every, 100)["reduction"] == Interval(0.5, 0.5, 0.5)


def test_a_trial_compares_with_the_untreated_arm(tiny: LoadedModel, treated: Treatment, sentences: list[str]) -> None:
    corpus = Corpus([text[:20] for text in sentences], sentences)
    trial = Trial.draw(tiny, corpus, Setting(Direction.SUPPRESS, ODD), 6, 2, 0, 512)
    itself = trial.compare(trial.untreated, trial.benign.read(Treatment.none(tiny)))
    assert vars(itself.reduction) == {"value": 0, "low": 0, "high": 0}
    assert vars(itself.continuation_perplexity_ratio) == {"value": 1, "low": 1, "high": 1}
    assert vars(itself.kl) == {"value": 0, "low": 0, "high": 0}
    outcome, reading = trial.run(treated, ""), trial.benign.read(treated)
    found = trial.compare(outcome, reading)
    shown = [int(ODD.flags([c.text for c in o.continuations]).sum()) for o in (outcome, trial.untreated)]
    assert found.reduction.value == pytest.approx(1 - shown[0] / shown[1])
    assert found.rate.value == pytest.approx(shown[0] / 12)
    assert found.difference.value == pytest.approx((shown[0] - shown[1]) / 12)
    assert found.kl.value == pytest.approx(reading.mean_kl)
