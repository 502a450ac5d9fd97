"""Who says that a text shows a concept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.concept_eval.judges import judge
from steerserve.lab.concept_eval.prompts import joined
from steerserve.lab.concept_eval.texts import Corpus, Labels
from steerserve.lab.corpus import Split
from steerserve.lab.lexicon import Lexicon


@pytest.mark.parametrize(
    ("name", "flagged", "passed"),
    [
        ("profanity", ["what the fuck", "a twat", "f**k off"], ["Scunthorpe", "a duck", ""]),
        ("alt-profanity-check", ["you fucking idiot"], ["a lovely day"]),
        ("vader-negative", ["a horrible, disgusting film"], ["a wonderful film", "the film", ""]),
        ("vader-positive", ["a wonderful film"], ["a horrible, disgusting film", "the film", ""]),
    ],
)
def test_built_in_judges(name: str, flagged: list[str], passed: list[str]) -> None:
    mask = judge(name).flags([*flagged, *passed])
    assert mask.tolist() == [True] * len(flagged) + [False] * len(passed)


def test_a_judge_sorts_texts_that_no_label_does(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    glad, glum = [f"a wonderful film {i}" for i in range(40)], [f"a horrible film {i}" for i in range(40)]
    path.write_text("\n".join([*glad, *glum]))
    corpus = Corpus.read([path], [path], Split.TRAIN, None, Labels(judge=judge("vader-negative")))
    assert len(corpus.positive) > 20
    assert set(corpus.positive) < set(glum)
    assert set(corpus.negative) < set(glad)
    assert len(set(corpus.negative)) == len(corpus.negative), "a file that is named twice is read once"
    with pytest.raises(AssetError, match="no positive text of the train split"):
        Corpus.read([path], [], Split.TRAIN, None, Labels(judge=judge("alt-profanity-check")))


def test_a_word_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "wine.json"
    path.write_text(json.dumps({"selection": {"wine": ["wine", "Wines"]}, "held_out": {"grape": ["grape"]}}))
    wine = judge(f"lexicon:{path}")
    assert wine.flags(["red WINES", "a grape", "swine"]).tolist() == [True, True, False]
    assert wine.words == path
    assert not Lexicon.load(path, "selection").matches("a grape")
    path.write_text(json.dumps({"selection": {"wine": ["wine"]}}))  # nothing held out
    assert judge(f"lexicon:{path}").flags(["wine", "grape"]).tolist() == [True, False]


def test_phrases(tmp_path: Path) -> None:
    path = tmp_path / "refusals.txt"
    path.write_text("I'm sorry\nI cannot\n\n")
    refusal = judge(f"phrases:{path}")
    texts = ["I’M SORRY, but no", "well, I cannot.", "I cannoth", "sorry"]
    assert refusal.flags(texts).tolist() == [True, True, False, False]


@pytest.mark.parametrize("content", ["[]", "{", '{"held_out": {}}', '{"selection": {"a": 3}}'])
def test_a_file_that_is_no_word_list(tmp_path: Path, content: str) -> None:
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(AssetError, match=r"words\.json: expected a JSON object"):
        judge(f"lexicon:{path}")


def test_unknown_judges_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="vader-negative"):
        judge("oracle")
    for kind in ("lexicon", "phrases"):
        with pytest.raises(InvalidRequestError):
            judge(f"{kind}:")
        with pytest.raises(AssetError, match="nowhere"):
            judge(f"{kind}:{tmp_path / 'nowhere'}")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(AssetError, match="found none"):
        judge(f"phrases:{tmp_path / 'empty.txt'}")


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
