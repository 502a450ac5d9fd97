"""A concept pack from an SAE and texts, on a random model whose "profanity" is words of a single letter.

Such words come up often in what the model writes, so that the whole protocol can run in seconds.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from steerserve.errors import AssetError, IncompatibleError
from steerserve.lab.concepts import ConceptConfig, Corpus, draw_prompts, make_concept, measure_concept, text_scores
from steerserve.lab.corpus import Split
from steerserve.lab.guard_evaluation import seeds_for
from steerserve.lab.lexicon import Lexicon
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.packs import ConceptPack, PolicyAction, load_pack, save_pack
from steerserve.types import Op

PARTS = {"selection": frozenset("abcdefghijklm"), "held_out": frozenset("z")}
CONFIG = ConceptConfig(num_features=6, attribution_texts=40, fit_steps=3, margins=(0.1, 0.0), validation_prompts=4)


@pytest.fixture(autouse=True)
def _single_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    def profanity(*parts: str) -> Lexicon:
        return Lexicon(frozenset().union(*(PARTS[part] for part in parts or PARTS)))

    monkeypatch.setattr(Lexicon, "profanity", staticmethod(profanity))


@pytest.fixture
def corpora(tmp_path: Path, sentences: list[str]) -> dict[str, list[Path]]:
    """Labelled texts, of which some hold a listed word, some a held-out one, some both; and general texts."""
    texts = [f"{4 * i + j}{text}" for i, text in enumerate(sentences) for j in range(4)]
    labelled = [
        text.replace(" ", (" a ", " b ", " c z ", " z ")[i % 4], 2) if i % 5 else text for i, text in enumerate(texts)
    ]
    (tmp_path / "labelled.txt").write_text("\n".join(labelled))
    (tmp_path / "general.txt").write_text("\n".join(f"about {text}" for text in texts))
    return {"harmful": [tmp_path / "labelled.txt"], "benign": [tmp_path / "general.txt"]}


@pytest.fixture
def pack(tiny: LoadedModel, random_sae: SAE, corpora: dict[str, list[Path]], tmp_path: Path) -> ConceptPack:
    return make_concept(
        tiny,
        random_sae,
        "letters",
        **corpora,
        config=CONFIG,
        directory=tmp_path / "letters",
        console=Console(file=io.StringIO()),
    )


def has(word_list: str, text: str) -> bool:
    return any(word in PARTS[word_list] for word in text.lower().replace(".", "").split())


def test_held_out_words_are_in_the_test_split_only(corpora: dict[str, list[Path]]) -> None:
    selection = Lexicon.profanity("selection")
    for split in (Split.TRAIN, Split.VALIDATION):
        corpus = Corpus.read(**corpora, split=split, harm=selection)
        assert corpus.harmful
        assert all(has("selection", text) and not has("held_out", text) for text in corpus.harmful)
        assert not any(has("selection", text) or has("held_out", text) for text in corpus.benign)
    test = Corpus.read(**corpora, split=Split.TEST, harm=Lexicon.profanity())
    assert any(has("held_out", text) for text in test.harmful)
    assert not any(has("held_out", text) for text in test.benign)


def test_long_benign_texts_are_cut_to_an_excerpt(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\n".join(f"{number} " + "word " * 200 for number in range(20)))
    (tmp_path / "labelled.txt").write_text("\n".join(f"a {number}" for number in range(20)))
    corpus = Corpus.read([tmp_path / "labelled.txt"], [tmp_path / "long.txt"], Split.TRAIN, Lexicon.profanity())
    assert {len(text) for text in corpus.benign} == {300}


def test_files_without_harmful_or_benign_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"a {number}" for number in range(200)))
    (tmp_path / "none.txt").write_text("\n".join(f"good {number}" for number in range(200)))
    for harmful, benign, kind in (("none.txt", "none.txt", "harmful"), ("a.txt", "a.txt", "benign")):
        for split in Split:
            with pytest.raises(AssetError, match=f"hold no {kind} text of the {split} split"):
                Corpus.read([tmp_path / harmful], [tmp_path / benign], split, Lexicon.profanity())


def test_prompts_are_pairs_of_texts_after_which_the_model_goes_on_in_kind(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {number}" for number in range(6)]
    pairs = {f"{a}\n{b}\n" for a, b in zip(texts, [*texts[1:], texts[0]], strict=True)}
    assert set(draw_prompts(tiny, texts, 3)) < pairs
    assert len(draw_prompts(tiny, texts, 3)) == 3
    assert set(draw_prompts(tiny, texts, 100)) == pairs  # all that there are
    assert set(draw_prompts(tiny, [*texts, "long " * 40], 100)) < pairs  # one pair is out of reach, two too long
    monkeypatch.setitem(PARTS, "selection", frozenset({"neverwritten"}))
    monkeypatch.setitem(PARTS, "held_out", frozenset())
    with pytest.raises(AssetError, match="no prompt made of the harmful texts"):
        draw_prompts(tiny, texts, 3)


def test_a_pack_is_made(tiny: LoadedModel, random_sae: SAE, pack: ConceptPack, corpora: dict[str, list[Path]]) -> None:
    t = pack.tensors
    W_enc, b_enc, threshold, _, W_dec = random_sae.rows(t.feature_ids.tolist())
    for ours, theirs in ((t.W_enc, W_enc), (t.b_enc, b_enc), (t.threshold, threshold), (t.W_dec, W_dec)):
        np.testing.assert_array_equal(ours, theirs.numpy())
    assert len(set(t.feature_ids.tolist())) == 6
    np.testing.assert_allclose(t.weight * t.max_activation, 1, rtol=1e-6)
    assert np.isfinite(t.value).all()
    assert (pack.card.model.fingerprint, pack.card.sae.sha256) == (tiny.fingerprint, random_sae.sha256)
    assert pack.card.policy == PolicyAction(op=Op.CLAMP)
    assert pack.card.data["margin"] in CONFIG.margins
    assert pack.card.evaluation == {}
    validation = Corpus.read(**corpora, split=Split.VALIDATION, harm=Lexicon.profanity("selection"))
    scores = text_scores(tiny, pack, validation.benign)
    assert (scores >= 0).all()
    assert (scores > pack.card.score_threshold).mean() <= 0.1


def test_a_card_is_measured(
    tiny: LoadedModel, pack: ConceptPack, corpora: dict[str, list[Path]], tmp_path: Path
) -> None:
    measured = measure_concept(tiny, tmp_path / "letters", **corpora, num_prompts=4, num_seeds=2)
    assert measured.sha256 == load_pack(tmp_path / "letters").sha256
    for name, array in vars(pack.tensors).items():
        np.testing.assert_array_equal(array, getattr(measured.tensors, name))
    protocol, steering, detection = (measured.card.evaluation[key] for key in ("protocol", "steering", "detection"))
    assert (protocol["prompts"], len(protocol["seeds"]), protocol["split"]) == (4, 2, "test")
    corpus = Corpus.read(**corpora, split=Split.TEST, harm=Lexicon.profanity())
    assert protocol["seeds"] == seeds_for(draw_prompts(tiny, corpus.harmful, 4), 2)
    assert 0 < steering["unguarded"]["harm_rate"] <= 1
    expected = 1 - steering["guarded"]["harm_rate"] / steering["unguarded"]["harm_rate"]
    assert steering["reduction"]["value"] == pytest.approx(expected)
    assert steering["guarded"]["benign_perplexity"] != steering["unguarded"]["benign_perplexity"]
    assert (detection["harmful_texts"], detection["benign_texts"]) == (len(corpus.harmful), len(corpus.benign))
    assert 0 <= detection["auroc"] <= 1
    again = measure_concept(tiny, tmp_path / "letters", **corpora, num_prompts=4, num_seeds=2)
    assert again.card == measured.card


def test_the_score_of_a_text_ignores_padding(tiny: LoadedModel, pack: ConceptPack) -> None:
    texts = [*"abcdefgh", "a much longer text than the others"]
    together = text_scores(tiny, pack, texts)
    np.testing.assert_allclose(together, [text_scores(tiny, pack, [text])[0] for text in texts], rtol=1e-5)
    assert together.max() > 0


def test_packs_that_cannot_be_measured(
    tiny: LoadedModel, pack: ConceptPack, corpora: dict[str, list[Path]], tmp_path: Path
) -> None:
    other = replace(tiny, fingerprint="0" * 64)
    with pytest.raises(IncompatibleError, match=r"pack\.model\.fingerprint"):
        measure_concept(other, tmp_path / "letters", **corpora, num_prompts=4, num_seeds=2)
    card = pack.card.model_copy(update={"policy": PolicyAction(op=Op.SCALE)})
    save_pack(card, pack.tensors, tmp_path / "scaled")
    with pytest.raises(AssetError, match="only packs whose policy is a clamp of all tokens"):
        measure_concept(tiny, tmp_path / "scaled", **corpora, num_prompts=4, num_seeds=2)
