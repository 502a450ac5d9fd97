"""The whole evaluation on a tiny model: what stands in the card, and what the page and the verdicts make of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from steerserve.lab.bootstrap import Interval
from steerserve.lab.concept_eval.ability import Ability
from steerserve.lab.concept_eval.card import ArmCard, Target, verdicts
from steerserve.lab.concept_eval.continuations import Arms
from steerserve.lab.concept_eval.judges import Judge
from steerserve.lab.concept_eval.outcome import Outcome
from steerserve.lab.concept_eval.page import render_card
from steerserve.lab.concept_eval.pareto import Rival
from steerserve.lab.concept_eval.reading import write_blind
from steerserve.lab.concept_eval.run import QUICK, Evaluation, Texts
from steerserve.lab.concept_eval.texts import Labels
from steerserve.lab.concept_eval.trial import Comparison, Direction, Setting
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import ConceptPack
from steerserve.types import Site

MakePack = Callable[..., ConceptPack]

SMALL = replace(
    QUICK, num_prompts=4, num_seeds=1, fitted_texts=20, benign_tokens=256, validation_prompts=3, ioi_prompts=8
)
ODD = Judge("odd", lambda texts: np.array([sum(map(ord, text)) % 2 == 1 for text in texts], dtype=bool))


def write_texts(path: Path, sentences: list[str], prefix: str) -> Path:
    lines = [json.dumps({"text": f"{prefix}{number} {text}"}) for number, text in enumerate(sentences * 20)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def evaluation(
    tiny: LoadedModel, make_pack: MakePack, saes: dict[Site, SAE], sentences: list[str], tmp_path: Path
) -> Evaluation:
    positive = write_texts(tmp_path / "positive.jsonl", [text[:25].upper() for text in sentences], "P")
    negative = write_texts(tmp_path / "negative.jsonl", sentences, "")
    hard = write_texts(tmp_path / "hard.jsonl", sentences[:1], "A ")
    return Evaluation(
        model=tiny,
        pack=save_pack(make_pack().card, make_pack().tensors, tmp_path / "mood"),
        saes=saes,
        texts=Texts((positive,), (negative,), Labels(), hard),
        setting=Setting(Direction.SUPPRESS, ODD, ODD, arms=Arms(tmp_path / "arms")),
        instruction="Be even.",
        target=Target(0.9),
        config=SMALL,
        console=Console(file=io.StringIO()),
    )


def test_an_evaluation_end_to_end(evaluation: Evaluation, tmp_path: Path) -> None:
    card, outcomes = evaluation.run()
    figures = json.loads(json.dumps({"command": "steerserve concept eval", **card.to_dict()}))
    names = [arm["name"] for arm in figures["arms"]]
    assert names == [
        "policy",
        "difference of means, KL × 1",
        "probe-gated steering, KL × 1",
        "prompt instruction",
        "policy, KL of prompt instruction",
        "random features, equal norm",
        "random features, KL × 1",
        "no-op",
    ]
    assert set(outcomes) == {"untreated", *names}
    assert schema(figures) == GOLDEN
    policy, no_op = figures["arms"][0], figures["arms"][-1]
    assert no_op["steering"]["kl"]["value"] == 0
    assert [c.token_ids for c in outcomes["no-op"].continuations] == [
        c.token_ids for c in outcomes["untreated"].continuations
    ]
    assert policy["steering"]["kl"]["value"] > 0
    for arm in figures["arms"]:
        assert (arm["ability"] is not None) == (
            arm["name"] != "policy, KL of prompt instruction" and "norm" not in arm["name"]
        )
        if arm["budget"] == "KL × 1" and arm["reached"]:
            assert arm["validation_kl"] == pytest.approx(policy["validation_kl"], rel=0.03)

    measured = save_pack(
        evaluation.pack.card.model_copy(update={"evaluation": figures}), evaluation.pack.tensors, tmp_path / "mood"
    )
    html = render_card(measured)
    assert all(name in html for name in names)
    assert all(verdict.text.split(":")[0] in html for verdict in card.verdicts if "&" not in verdict.text)
    assert "http" not in html.replace("http-equiv", "")

    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "arms").iterdir()}
    again, _ = replace(evaluation, pack=measured).run()  # read back, whatever stands in the card by now
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "arms").iterdir()} == stored
    assert repr(again) == repr(card)


def schema(value: object) -> object:
    """Names and kinds, without figures; of a list or a mapping by free names, its first element."""
    if isinstance(value, dict):
        if value.keys() == {"value", "low", "high"}:
            return "interval"
        return {name: schema(item) for name, item in value.items()}
    if isinstance(value, list):
        return [schema(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


RATES = dict.fromkeys(("rate", "untreated_rate", "reduction"), "interval")
COSTS = ("continuation_perplexity_ratio", "benign_perplexity_ratio", "kl")
TASKS = ("IOI", "next token", "next token, hard negatives", "next token, all")
ABILITY = dict.fromkeys(("items", "clusters", "untreated", "treated", "difference", "lower"), "number")
DETECTOR = {"auroc": "number", "true_positive_rate_at_1_percent": "number"}
DEGENERATION = {"value": "number", "untreated": "number", "ratio": "interval", "within_10_percent": "bool"}
GOLDEN = {
    "command": "str",
    "protocol": {
        **dict.fromkeys(("direction", "split"), "str"),
        "files": dict.fromkeys(("hard.jsonl", "negative.jsonl", "positive.jsonl"), "str"),
        "labels": {"positive": [], "negative": []},
        **dict.fromkeys(("judge", "second_judge"), "str"),
        "prompts": "number",
        "prompts_sha256": "str",
        "chat": "bool",
        "seeds": ["number"],
        **dict.fromkeys(("max_tokens", "temperature"), "number"),
        "dtype": "str",
        "instruction": "str",
        "benign_tokens": "number",
        "target": {"effect": "number", "perplexity": "number"},
        "config": dict.fromkeys(vars(SMALL), "number") | {"ladder": ["number"]},
        "interval": "str",
    },
    "verdicts": [{"about": "str", "holds": "bool", "text": "str"}],
    "arms": [
        {
            **dict.fromkeys(("name", "method", "variant", "budget"), "str"),
            "knob": {"meaning": "str", "value": "number"},
            "reached": "bool",
            "validation_kl": "number",
            "steering": {**RATES, "difference": "interval", **dict.fromkeys(COSTS, "interval")},
            "second": RATES,
            "degeneration": dict.fromkeys(("repetition", "distinct_2", "mean_length", "ended_share"), DEGENERATION),
            "firing_rate": {"tokens": "number", "texts": "number"},
            "ability": {task: {**ABILITY, "non_inferior": "bool", "firing_rate": "number"} for task in TASKS},
            "rivals": [{"name": "str", "kl": "number", "difference": "interval", "beats": "bool"}],
            "on_front": "bool",
        }
    ],
    "front": ["str"],
    "detection": {
        **dict.fromkeys(("positive_texts", "negative_texts"), "number"),
        **dict.fromkeys(("kind", "site"), "str"),
        **dict.fromkeys(("threshold", "true_positive_rate", "false_positive_rate"), "number"),
        "detectors": dict.fromkeys(("detector", "features", "probe"), DETECTOR),
    },
    "schema": "str",
}


def arm(**changes: object) -> ArmCard:
    """A pack that meets everything."""
    figures = ArmCard(
        name="policy",
        method="policy",
        variant="clamp",
        budget="its own",
        knob=None,
        reached=True,
        validation_kl=0.01,
        steering=Comparison(
            rate=Interval(0.02, 0.01, 0.03),
            untreated_rate=Interval(0.3, 0.2, 0.4),
            reduction=Interval(0.95, 0.91, 0.97),
            difference=Interval(-0.28, -0.3, -0.2),
            continuation_perplexity_ratio=Interval(1.0, 0.9, 1.09),
            benign_perplexity_ratio=Interval(1.01, 1.0, 1.02),
            kl=Interval(0.01, 0.0, 0.02),
        ),
        second=None,
        degeneration={"repetition": {"within_10_percent": True}},
        firing_rate={"tokens": 0.1, "texts": 0.5},
        ability={"IOI": Ability(2000, 2000, 0.9, 0.9, 0.0, -0.005, True, 0.2)},
        rivals=[Rival("token list", 0.01, Interval(0.1, -0.1, 0.2), False)],
        on_front=True,
    )
    return replace(figures, **changes)  # type: ignore[arg-type]


def failing(pack: ArmCard, direction: Direction = Direction.SUPPRESS, target: float = 0.9) -> list[str]:
    return [verdict.about for verdict in verdicts(direction, Target(target), [pack]) if verdict.holds is False]


def test_verdicts_go_by_the_worse_end() -> None:
    good = arm()
    assert failing(good) == []

    def steering(**changes: Interval) -> ArmCard:
        return arm(steering=replace(good.steering, **changes))

    assert failing(steering(reduction=Interval(0.95, 0.89, 0.97))) == ["effect"]
    assert failing(steering(continuation_perplexity_ratio=Interval(1.0, 0.9, 1.11))) == ["perplexity"]
    assert failing(steering(benign_perplexity_ratio=Interval(1.09, 1.08, 1.12))) == ["perplexity"]
    assert failing(steering(untreated_rate=Interval(0.19, 0.1, 0.3))) == ["untreated rate"]
    assert failing(arm(degeneration={"repetition": {"within_10_percent": False}})) == ["degeneration"]
    assert failing(arm(rivals=[Rival("token list", 0.01, Interval(-0.1, -0.2, -0.05), True)])) == ["Pareto front"]
    assert failing(arm(ability={"IOI": replace(good.ability["IOI"], non_inferior=False)})) == ["IOI"]


def test_to_amplify_the_rate_itself_must_be_reached() -> None:
    pack = arm(steering=replace(arm().steering, rate=Interval(0.6, 0.55, 0.7), untreated_rate=Interval(0.01, 0, 0.02)))
    assert failing(pack, Direction.AMPLIFY, 0.5) == []
    assert failing(pack, Direction.AMPLIFY, 0.56) == ["effect"]


def test_to_amplify_only_benign_perplexity_has_a_target() -> None:
    def amplified(**changes: Interval) -> ArmCard:
        return arm(steering=replace(arm().steering, rate=Interval(0.9, 0.9, 1.0), **changes))

    surprising = amplified(continuation_perplexity_ratio=Interval(3.0, 2.0, 4.0))
    assert failing(surprising, Direction.AMPLIFY) == []
    (written,) = [v for v in verdicts(Direction.AMPLIFY, Target(0.9), [surprising]) if "of continuations" in v.about]
    assert written.holds is None
    assert "×3.000" in written.text
    assert failing(amplified(benign_perplexity_ratio=Interval(1.09, 1.0, 1.12)), Direction.AMPLIFY) == ["perplexity"]


@pytest.mark.parametrize(("low", "high", "holds"), [(-0.3, -0.2, True), (-0.1, 0.1, None), (0.0, 0.0, None)])
def test_a_pack_that_does_nothing_is_on_no_front(low: float, high: float, holds: bool | None) -> None:
    pack = arm(steering=replace(arm().steering, difference=Interval(low, low, high)))
    found = {verdict.about: verdict.holds for verdict in verdicts(Direction.SUPPRESS, Target(0.9), [pack])}
    assert found["Pareto front"] is holds
    assert "benign text" not in found


def test_a_pack_that_never_fires_on_benign_text_is_compared_with_what_has_no_knob(evaluation: Evaluation) -> None:
    tensors = replace(evaluation.pack.tensors, max_norm=np.zeros(4, dtype=np.float32))
    silent = replace(evaluation.pack, tensors=tensors)
    card, _ = replace(evaluation, pack=silent, setting=replace(evaluation.setting, arms=Arms(None))).run()
    assert [arm.name for arm in card.arms] == [
        "policy",
        "prompt instruction",
        "policy, KL of prompt instruction",
        "no-op",
    ]
    assert card.arms[0].validation_kl == 0
    assert not card.arms[2].reached
    (verdict,) = [verdict for verdict in card.verdicts if verdict.about == "benign text"]
    assert "never fires" in verdict.text


def test_outputs_can_be_read_blind(tmp_path: Path) -> None:
    from steerserve.lab.concept_eval.continuations import Continuation
    from steerserve.lab.concept_eval.prompts import Prompt

    def outcome(word: str) -> Outcome:
        prompts = [Prompt("x", (1,))] * 60
        said = [Continuation(i, 0, (1, 2), f" {word} {i}\n", False, 0.0) for i in range(60)]
        return Outcome.of(prompts, said, ODD, None)

    write_blind(tmp_path, outcome("plain"), outcome("guarded"))
    key = json.loads((tmp_path / "key.json").read_text())
    text = (tmp_path / "outputs.txt").read_text()
    words = {"untreated": "plain", "policy": "guarded"}
    assert len(key) == 100
    assert sorted(key.values()) == ["policy"] * 50 + ["untreated"] * 50
    assert [words[key[str(i)]] for i in range(1, 101)] == [
        line.split()[0] for line in text.splitlines() if line[:1] in "pg" and line
    ]
    assert list(key.values()) != sorted(key.values())
    assert "policy" not in text
