"""Every method edits what it says, and costs more the further its knob is turned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerserve.lab.concept_eval import continuations
from steerserve.lab.concept_eval.benign import BenignText
from steerserve.lab.concept_eval.caps import cap_pack
from steerserve.lab.concept_eval.contrast import Contrast, contrasts
from steerserve.lab.concept_eval.methods import (
    BAN,
    GATED,
    Method,
    difference_of_means,
    instructions,
    listed_tokens,
    no_op,
    parts,
    policy,
    probe_gated,
    random_features,
    token_list,
)
from steerserve.lab.concept_eval.prompts import candidates
from steerserve.lab.concept_eval.teacher_forced import Trace
from steerserve.lab.concept_eval.texts import Corpus
from steerserve.lab.concept_eval.treatments import Treatment
from steerserve.lab.concept_eval.trial import Direction
from steerserve.lab.lexicon import Lexicon
from steerserve.lab.pooled_probe import TokenRows
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.packs import ConceptPack
from steerserve.types import Op, Site

MakePack = Callable[..., ConceptPack]


@pytest.fixture
def seen(tiny: LoadedModel, make_pack: MakePack, sentences: list[str]) -> dict[Site, Contrast]:
    corpus = Corpus([text.upper() for text in sentences[:20]], sentences[20:40])
    return contrasts(tiny, make_pack().sites, corpus, 20)


@pytest.fixture
def benign(tiny: LoadedModel, sentences: list[str]) -> BenignText:
    return BenignText.contexts(tiny, sentences, 384, layer=0)


SITE = Site.parse("blocks.1.hook_resid_post")


def contrast_of(rows: torch.Tensor) -> Contrast:
    """Of activations ``[2, texts, T, d]``, positive ones first."""
    _, num_texts, length, d = rows.shape
    text = torch.arange(2 * num_texts).repeat_interleave(length)
    label = (torch.arange(2 * num_texts) < num_texts).float()
    return Contrast(SITE, TokenRows({SITE: rows.reshape(-1, d)}, text, label))


def planted(gap: float) -> Contrast:
    """Two clouds that differ along the first axis, with more noise along the second."""
    rows = torch.randn(2, 400, 10, 32, generator=torch.Generator().manual_seed(0))
    rows[..., 1] *= 5
    rows[0, ..., 0] += gap
    return contrast_of(rows)


def test_what_simple_methods_learn() -> None:
    contrast = planted(3.0)
    difference = contrast.difference_of_means()
    assert difference[0] == pytest.approx(3.0, abs=0.1)
    assert np.abs(difference[1:]).max() < 0.4
    probe = contrast.probe()
    assert probe[0] > 0.95
    assert np.linalg.norm(probe) == pytest.approx(1.0)


def test_a_probe_finds_what_one_token_of_a_text_shows() -> None:
    """All tokens of positive texts lie a little along the second axis, one far along the first."""
    rows = torch.randn(2, 400, 10, 32, generator=torch.Generator().manual_seed(0))
    rows[0, ..., 1] += 0.2
    rows[0, :, 4, 0] += 6
    probe = contrast_of(rows).probe()
    assert probe[0] > 0.9


def test_attention_sinks_and_padding_are_left_out(tiny: LoadedModel, make_pack: MakePack) -> None:
    pack = make_pack()
    texts = Corpus(["abcdef", "a much longer text"], ["abc"])
    found = contrasts(tiny, pack.sites, texts, 5)
    lengths = [len(tiny.tokenizer(text).input_ids) for text in texts.positive]
    assert len(found[pack.sites[0]].positive) == sum(length - 1 for length in lengths)  # the first of each is a sink


@pytest.mark.parametrize("direction", list(Direction))
def test_knobs_cost_more_the_further_they_are_turned(
    tiny: LoadedModel,
    make_pack: MakePack,
    saes: dict[Site, SAE],
    seen: dict[Site, Contrast],
    benign: BenignText,
    sentences: list[str],
    direction: Direction,
) -> None:
    pack = make_pack(Op.CLAMP if direction is Direction.SUPPRESS else Op.ADD)
    site = pack.sites[1]
    words = Lexicon(frozenset("abc"))
    methods: list[Method] = [
        policy(tiny, pack),
        difference_of_means(tiny, seen[site], direction, 100.0),
        *probe_gated(tiny, seen[site], direction),
        random_features(tiny, pack, saes, seen),
    ]
    if direction is Direction.AMPLIFY:
        methods.append(token_list(tiny, words, sentences, direction))
    for method in methods:
        assert method.knob is not None
        kl = [benign.read(method.treatment(factor * method.knob.start)).mean_kl for factor in (0.0, 0.5, 1.0, 2.0)]
        assert kl == sorted(kl), method.name
        assert kl[0] < 1e-6 < kl[2], (method.name, kl)


def test_the_cap_is_a_cap(tiny: LoadedModel, seen: dict[Site, Contrast], make_pack: MakePack) -> None:
    contrast = seen[make_pack().sites[1]]
    method = difference_of_means(tiny, contrast, Direction.SUPPRESS, 100.0)
    (pack,) = method.treatment(2.0).catalog.packs.values()
    unit = contrast.difference_of_means() / np.linalg.norm(contrast.difference_of_means())
    positive, negative = contrast.positive.numpy() @ unit, contrast.negative.numpy() @ unit
    top = max(positive.max(), negative.max())
    assert pack.card.policy.op is Op.CLIP
    assert -pack.tensors.b_enc[0] == pytest.approx(top - 2 * negative.std(), rel=1e-3)
    np.testing.assert_allclose(pack.tensors.W_enc[0], unit, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cap", [-2.0, 2.0])
def test_a_cap_ends_at_its_domain(tiny: LoadedModel, make_pack: MakePack, cap: float) -> None:
    """Rows beyond it keep their bits, even where the cap is below 0."""
    site = make_pack().sites[1]
    unit = np.eye(32, dtype=np.float32)[0]
    pack = cap_pack(tiny, site, unit, max_norm=10.0, cap=cap, largest=5.0)
    x = torch.zeros(1, 5, 32)
    x[0, :, 0] = torch.tensor([-5.0, 1.0, 5.0, 30.0, -30.0])
    edited = Trace(Treatment.policy(tiny, pack).plan, (1, 5)).functions()[site](x)
    torch.testing.assert_close(edited[0, :3, 0], x[0, :3, 0].clamp(max=cap))
    assert torch.equal(edited[0, 3:], x[0, 3:])


@pytest.mark.parametrize("direction", list(Direction))
def test_a_gate_opens_on_the_share_it_names(
    tiny: LoadedModel, seen: dict[Site, Contrast], make_pack: MakePack, direction: Direction
) -> None:
    contrast = seen[make_pack().sites[1]]
    for method, quantile in zip(probe_gated(tiny, contrast, direction), (0.9, 0.99), strict=True):
        assert method.name == GATED
        (intervention,) = method.treatment(3.0).steering.interventions
        assert intervention.gate is not None
        scores = contrast.negative.numpy() @ intervention.gate.target.vector
        share = (scores > intervention.gate.threshold).mean()
        suppress = direction is Direction.SUPPRESS
        assert share == pytest.approx(1 - quantile if suppress else quantile, abs=0.005)
        assert intervention.value == (-3.0 if suppress else 3.0)
        assert f"{1 - quantile if suppress else quantile:.0%}" in method.variant


def test_random_features_are_live_new_and_as_dense(
    tiny: LoadedModel, make_pack: MakePack, saes: dict[Site, SAE], seen: dict[Site, Contrast]
) -> None:
    pack = make_pack()
    (impostor,) = random_features(tiny, pack, saes, seen).treatment(1.0).catalog.packs.values()
    for site in pack.sites:
        own, other = pack.at(site), impostor.at(site)
        assert not set(other.feature_ids) & set(pack.tensors.feature_ids)
        assert len(set(other.feature_ids)) == 2
        f = saes[site].encode(torch.cat([seen[site].positive, seen[site].negative]))
        assert ((f > 0).float().mean(0)[other.feature_ids] > 0).all()
        np.testing.assert_array_equal(other.W_dec, saes[site].W_dec[other.feature_ids].numpy())
        np.testing.assert_allclose(other.value / other.max_activation, own.value / own.max_activation, rtol=1e-5)
    (again,) = random_features(tiny, pack, saes, seen).treatment(1.0).catalog.packs.values()
    assert again.sha256 == impostor.sha256


def test_random_directions_have_the_norm_of_the_packs(tiny: LoadedModel, make_pack: MakePack, seen: dict) -> None:
    pack = make_pack()
    tensors = replace(pack.tensors, feature_ids=np.full(4, -1))
    (impostor,) = random_features(tiny, replace(pack, tensors=tensors), {}, seen).treatment(1.0).catalog.packs.values()
    norms = [np.linalg.norm(t.W_dec, axis=1) for t in (pack.tensors, impostor.tensors)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert np.abs((pack.tensors.W_dec * impostor.tensors.W_dec).sum(1)).max() < 0.7


def test_a_policy_taken_apart(tiny: LoadedModel, make_pack: MakePack) -> None:
    pack = make_pack()
    assert parts(tiny, pack) == []
    mixed = replace(pack, tensors=replace(pack.tensors, feature_ids=np.array([3, -1, 20, -1])))
    apart = parts(tiny, mixed)
    rows = [next(iter(method.treatment(0.0).catalog.packs.values())).tensors for method in apart]
    assert [tensors.edited.tolist() for tensors in rows] == [[True, False, True, False], [False, True, False, True]]
    assert all((tensors.W_dec == pack.tensors.W_dec).all() for tensors in rows)
    together = {len(method.treatment(0.0).plan.sites[0].row) for method in apart}
    assert together == {1}


def test_the_no_op_and_the_instruction(tiny: LoadedModel, make_pack: MakePack, benign: BenignText) -> None:
    assert benign.read(no_op(tiny, make_pack()).treatment(0.0)).mean_kl == 0
    for method in instructions(tiny, "Be polite.", chat=False):
        treatment = method.treatment(0.0)
        assert tiny.tokenizer.decode(treatment.prefix).count("Be polite.") == 1
        assert benign.read(treatment).mean_kl > 0


CHAT = """{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHAT


@pytest.fixture
def chatting(tiny: LoadedModel) -> LoadedModel:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = CHAT
    return replace(tiny, tokenizer=tokenizer)


def test_an_instruction_has_its_place_in_the_dialogue(chatting: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt is one dialogue: nothing stands before its template."""
    prompts = candidates(chatting, ["Hello.", " How are you?"], chat=True)
    requests: list[str] = []
    monkeypatch.setattr(
        continuations.Engine,
        "add_request",
        lambda _, request: requests.append(chatting.tokenizer.decode(request.prompt)),
    )
    methods = instructions(chatting, "Be polite.", chat=True)
    assert [method.variant for method in methods] == ["in the user's turn", "as a system message"]
    for method in methods:
        continuations.continue_prompts(chatting, method.treatment(0.0), prompts, [0], "")
    assert requests == [
        "<user>Be polite.\n\nHello.<end>\n<assistant>",
        "<user>Be polite.\n\n How are you?<end>\n<assistant>",
        "<system>Be polite.<end>\n<user>Hello.<end>\n<assistant>",
        "<system>Be polite.<end>\n<user> How are you?<end>\n<assistant>",
    ]


def test_a_template_that_refuses_system_messages(chatting: LoadedModel) -> None:
    chatting.tokenizer.chat_template = NO_SYSTEM
    assert [method.variant for method in instructions(chatting, "Be polite.", chat=True)] == ["in the user's turn"]


def test_an_instruction_brings_no_second_bos(with_bos: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[int, ...]] = []
    monkeypatch.setattr(continuations.Engine, "add_request", lambda _, request: requests.append(request.prompt))
    (method,) = instructions(with_bos, "Hi", chat=False)
    continuations.continue_prompts(with_bos, method.treatment(0.0), candidates(with_bos, ["a", "b"], False), [0], "")
    assert [request.count(257) for request in requests] == [1, 1]
    assert all(request[0] == 257 for request in requests)


def test_a_token_list_bans_words_and_telling_pieces(tiny: LoadedModel) -> None:
    """Tokens are bytes here: ``q`` is a word, ``zx`` is split, and only its rarer piece is banned, if rare enough."""
    ids = {letter: tiny.tokenizer(letter).input_ids[0] for letter in "qzxaQZX"}
    words = Lexicon(frozenset({"q", "zx", "aa"}))
    tokens = listed_tokens(tiny, words, ["a x X"] * 100)
    assert {ids["q"], ids["Q"], ids["z"], ids["Z"]} <= set(tokens)
    assert ids["a"] not in tokens
    assert ids["x"] not in tokens
    treatment = token_list(tiny, words, ["a x X"] * 100, Direction.SUPPRESS).treatment(0.0)
    assert dict(treatment.logit_bias) == dict.fromkeys(tokens, BAN)
