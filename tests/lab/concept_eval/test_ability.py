"""What may not be broken, and the arithmetic of not being worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from steerserve.lab.concept_eval.ability import IOI, NAMES, Ability, ioi_prompts
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.models.loading import LoadedModel
from steerserve.steering.packs import ConceptPack


def test_ioi_prompts() -> None:
    prompts = ioi_prompts(600)
    assert len({prompt.text for prompt in prompts}) == 600
    assert Counter(prompt.template for prompt in prompts) == {"ABBA": 300, "BABA": 300}
    for prompt in prompts:
        assert prompt.text.count(prompt.subject) == 2
        assert prompt.text.count(prompt.indirect_object) == 1
        assert prompt.indirect_object != prompt.subject
        first = prompt.text.index(prompt.indirect_object) < prompt.text.index(prompt.subject)
        assert first == (prompt.template == "ABBA")
        assert "{" not in prompt.text
        assert not prompt.text.endswith(" ")
    assert ioi_prompts(600) == prompts
    assert not any(a != b and b.startswith(a) for a in NAMES for b in NAMES)


def test_ioi_by_hand(tiny: LoadedModel, make_pack: Callable[[], ConceptPack]) -> None:
    """Names are bytes here: they are told apart where they part, whatever comes before."""
    prompts = ioi_prompts(60)
    ioi = IOI(tiny, prompts, layer=0)
    correct, fired = ioi.correct(Treatment.none(tiny))
    expected = []
    for prompt in sorted(prompts, key=lambda p: len(p.text)):
        a, b = f" {prompt.indirect_object}", f" {prompt.subject}"
        same = next(i for i in range(len(a)) if a[i] != b[i])
        with torch.no_grad():
            logits = tiny.model(torch.tensor([tiny.tokenizer(prompt.text + a[:same]).input_ids])).logits[0, -1]
        expected.append(
            bool(logits[tiny.tokenizer(a[same]).input_ids[0]] > logits[tiny.tokenizer(b[same]).input_ids[0]])
        )
    assert sum(correct) == sum(expected)
    assert 0 < sum(expected) < 60
    assert not fired.any()
    treatment = Treatment.policy(tiny, make_pack())
    ability = ioi.measure(treatment)
    assert (ability.items, ability.clusters, ability.untreated) == (60, 60, sum(expected) / 60)
    assert ability.treated == ioi.correct(treatment)[0].mean()
    assert ability.firing_rate > 0


@pytest.mark.parametrize(
    ("broken", "mended", "non_inferior"),
    [(0, 0, True), (10, 10, True), (40, 5, False), (5, 40, True), (300, 300, False)],
)
def test_not_shown_to_be_inferior_is_not_enough(broken: int, mended: int, non_inferior: bool) -> None:
    """Equal accuracy with many changes both ways leaves more than a point of doubt."""
    untreated = np.repeat([1.0, 0.0], 1000)
    treated = untreated.copy()
    treated[:broken] = 0
    treated[1000 : 1000 + mended] = 1
    ability = Ability.of(np.ones(2000), treated, untreated, 0.5)
    assert ability.difference == pytest.approx((mended - broken) / 2000)
    assert ability.lower <= ability.difference
    assert ability.non_inferior is non_inferior
