"""A treated model on given text does what the formulas say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerserve.errors import AssetError
from steerserve.lab.activations import activations_of
from steerserve.lab.bootstrap import Resamples
from steerserve.lab.concept_eval.benign import BenignText
from steerserve.lab.concept_eval.teacher_forced import Trace, earlier_layers, last_hidden, logits_of, scores_of
from steerserve.lab.concept_eval.treatments import Treatment, scaled
from steerserve.models.loading import LoadedModel
from steerserve.steering.catalog import Catalog
from steerserve.steering.packs import ConceptPack
from steerserve.types import ConceptTarget, DirectionTarget, Gate, Guard, GuardAction, Intervention, Op, SteeringSpec

MakePack = Callable[..., ConceptPack]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three rows of ten."""
    return torch.randint(0, 200, (3, 10), generator=torch.Generator().manual_seed(2))


def by_hand(pack: ConceptPack, site: int, x: torch.Tensor, strength: float) -> np.ndarray:
    """The clamped rows of one site, row by row in float64."""
    t = pack.at(pack.sites[site])
    rows = x.double().numpy()
    f = rows @ t.W_enc.T.astype(float) + t.b_enc
    f *= (f > t.threshold) & (np.linalg.norm(rows, axis=-1, keepdims=True) <= t.max_norm)
    assert (f > 0).any((0, 1)).all()
    return rows + strength * np.where(f > 0, t.value - f, 0.0) @ t.W_dec


@pytest.mark.parametrize(("strength", "max_norm"), [(1.0, math.inf), (0.5, math.inf), (2.5, 5.7)])
def test_a_policy_is_the_formula_at_each_of_its_sites(
    tiny: LoadedModel, make_pack: MakePack, strength: float, max_norm: float
) -> None:
    pack = make_pack(max_norm=max_norm)
    x = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    trace = Trace(Treatment.policy(tiny, pack, strength).plan, (3, 50))
    for index, site in enumerate(pack.sites):
        before = x.clone()
        edited = trace.functions()[site](x)
        expected = by_hand(pack, index, x, strength)
        np.testing.assert_allclose(edited.numpy(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(x, before)
    sizes = [
        np.linalg.norm(by_hand(pack, i, x, strength) - x.numpy(), axis=-1) / x.norm(dim=-1).numpy() for i in (0, 1)
    ]
    np.testing.assert_allclose(trace.relative_edit.numpy(), sizes[0] + sizes[1], rtol=1e-3, atol=1e-4)


def test_strength_0_leaves_every_bit(tiny: LoadedModel, make_pack: MakePack, tokens: torch.Tensor) -> None:
    plain, _ = last_hidden(tiny, Treatment.none(tiny), tokens)
    treated, trace = last_hidden(tiny, Treatment.policy(tiny, make_pack(), 0.0), tokens)
    assert torch.equal(plain, treated)
    assert not trace.relative_edit.any()


def test_later_layers_alone_give_the_same(tiny: LoadedModel, make_pack: MakePack, tokens: torch.Tensor) -> None:
    layers = tiny.adapter.layers(tiny.model)
    own = [layer.forward for layer in layers]
    for layer in (0, 1):
        earlier, plain = earlier_layers(tiny, layer, tokens)
        assert torch.equal(plain, last_hidden(tiny, Treatment.none(tiny), tokens)[0])
        pack = make_pack() if layer == 0 else None
        treatment = Treatment.none(tiny) if pack is None else Treatment.policy(tiny, pack)
        whole, _ = last_hidden(tiny, treatment, tokens)
        torch.testing.assert_close(last_hidden(tiny, treatment, tokens, earlier)[0], whole)
        wrong = replace(earlier, x=torch.zeros_like(earlier.x))
        assert not torch.allclose(last_hidden(tiny, treatment, tokens, wrong)[0], whole)  # it is what is read
    assert [layer.forward for layer in layers] == own  # the model is as it was


def test_an_instruction_comes_before_the_text(tiny: LoadedModel, tokens: torch.Tensor) -> None:
    treatment = replace(Treatment.none(tiny), prefix=(5, 6, 7))
    earlier, _ = earlier_layers(tiny, 1, tokens)
    hidden, trace = last_hidden(tiny, treatment, tokens, earlier)
    fed = torch.cat([torch.tensor([[5, 6, 7]]).expand(3, -1), tokens], 1)
    torch.testing.assert_close(hidden, last_hidden(tiny, Treatment.none(tiny), fed)[0][:, 3:])
    assert trace.relative_edit.shape == tokens.shape


def test_an_instruction_stands_in_the_place_of_a_bos_token(with_bos: LoadedModel, tokens: torch.Tensor) -> None:
    treatment = replace(Treatment.none(with_bos), prefix=(257, 6, 7))
    texts = torch.cat([torch.full((3, 1), 257), tokens], 1)
    hidden, trace = last_hidden(with_bos, treatment, texts)
    fed = torch.cat([torch.tensor([[257, 6, 7]]).expand(3, -1), tokens], 1)
    torch.testing.assert_close(hidden, last_hidden(with_bos, Treatment.none(with_bos), fed)[0][:, 2:])
    assert hidden.shape[:2] == trace.relative_edit.shape == texts.shape


def test_a_bias_is_added_to_the_logits(tiny: LoadedModel, tokens: torch.Tensor) -> None:
    hidden, _ = last_hidden(tiny, Treatment.none(tiny), tokens)
    plain = logits_of(tiny, Treatment.none(tiny), hidden)
    torch.testing.assert_close(plain, tiny.model(tokens).logits.float())
    biased = logits_of(tiny, replace(Treatment.none(tiny), logit_bias={3: 1.5, 9: -100.0}), hidden)
    difference = biased - plain
    torch.testing.assert_close(difference[..., [3, 9]], torch.tensor([1.5, -100.0]).expand(3, 10, 2), atol=1e-4, rtol=0)
    assert difference.abs().sum(-1).allclose(torch.tensor(101.5))


def test_scores_and_gates_are_those_of_a_request(tiny: LoadedModel, make_pack: MakePack, tokens: torch.Tensor) -> None:
    pack = make_pack()
    site = pack.detector_site
    vector = np.random.default_rng(0).normal(size=32).astype(np.float32)
    unit = torch.from_numpy(vector / np.linalg.norm(vector))
    guards = tuple(Guard(t, 0.0, GuardAction.FLAG) for t in (ConceptTarget("mood"), DirectionTarget(site, vector)))
    reading = Treatment(Catalog(tiny, {}, {"mood": pack}), SteeringSpec(guards=guards))
    x = activations_of(tiny, tokens, (site,))[site]
    f = x @ torch.from_numpy(pack.at(site).W_enc).T + torch.from_numpy(pack.at(site).b_enc)
    f = f * (f > torch.from_numpy(pack.at(site).threshold))
    scores = scores_of(tiny, reading, tokens)
    torch.testing.assert_close(scores[..., 0], f @ torch.tensor([0.25, 2.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[..., 1], x @ unit, rtol=1e-4, atol=1e-4)

    threshold = float((x @ unit).median()) + 0.01
    edit = Intervention(
        DirectionTarget(site, vector), Op.ADD, value=4.0, gate=Gate(DirectionTarget(site, vector), threshold)
    )
    _, trace = last_hidden(tiny, Treatment.interventions(tiny, edit), tokens)
    assert torch.equal(trace.relative_edit > 0, x @ unit > threshold)
    assert 0 < (trace.relative_edit > 0).float().mean() < 1


def test_what_is_alike_has_one_key(tiny: LoadedModel, make_pack: MakePack) -> None:
    """The card's figures must not be part of it: writing them would lose the arms they were computed from."""
    pack = make_pack()
    measured = ConceptPack(pack.card.model_copy(update={"evaluation": {"a": 1}}), pack.tensors, "e" * 64)
    treatments = [
        Treatment.none(tiny),
        Treatment.policy(tiny, pack),
        Treatment.policy(tiny, pack, 0.5),
        Treatment.policy(tiny, make_pack(Op.CLIP)),
        replace(Treatment.none(tiny), prefix=(1,)),
        replace(Treatment.none(tiny), prefix=(1,), opening=("a", "b")),
        replace(Treatment.none(tiny), logit_bias={1: 2.0}),
    ]
    keys = [treatment.key for treatment in treatments]
    assert len(set(keys)) == len(keys)
    assert Treatment.policy(tiny, measured).key == keys[1]
    assert scaled(pack, 1.0).tensors.W_dec.tolist() == pack.tensors.W_dec.tolist()


def test_a_reading_of_benign_text_by_hand(tiny: LoadedModel, make_pack: MakePack, sentences: list[str]) -> None:
    treatment = Treatment.policy(tiny, make_pack())
    text = BenignText.sentences(tiny, sentences[:11], layer=0)  # more than a batch, of different lengths
    reading = text.read(treatment)
    assert text.num_texts == 11
    for row, sentence in enumerate(sentences[:11]):
        tokens = torch.tensor([tiny.tokenizer(sentence).input_ids])
        plain = tiny.model(tokens).logits[0, :-1].double().log_softmax(-1)
        hidden, trace = last_hidden(tiny, treatment, tokens)
        treated = logits_of(tiny, treatment, hidden)[0, :-1].double().log_softmax(-1)
        target = tokens[0, 1:, None]
        expected = {
            "tokens": len(target),
            "kl": (plain.exp() * (plain - treated)).sum().item(),
            "nll": -treated.gather(1, target).sum().item(),
            "nll_untreated": -plain.gather(1, target).sum().item(),
            "correct": (treated.argmax(-1) == target[:, 0]).sum().item(),
            "fired": (trace.relative_edit[0, :-1] > 0).sum().item(),
            "relative_edit": trace.relative_edit[0, :-1].sum().item(),
        }
        found = {name: getattr(reading, name)[row] for name in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert reading.mean_kl > 1e-4
    assert 0 < reading.fired.sum() < reading.tokens.sum()
    ratio = reading.perplexity_ratio(Resamples(11))[0]
    assert ratio == pytest.approx(math.exp((reading.nll.sum() - reading.nll_untreated.sum()) / reading.tokens.sum()))


def test_no_treatment_costs_nothing(tiny: LoadedModel, make_pack: MakePack, sentences: list[str]) -> None:
    text = BenignText.contexts(tiny, sentences, 512, layer=0)
    assert (text.num_texts, text.num_tokens) == (4, 4 * 127)
    reading = text.read(Treatment.policy(tiny, make_pack(), 0.0))
    assert not reading.kl.any()
    assert not (reading.nll - reading.nll_untreated).any()


def test_too_little_benign_text_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(AssetError, match="fill no context of 128 tokens"):
        BenignText.contexts(tiny, ["short"], 512, layer=0)
