"""What the word-list judge calls profane, in the spellings people use, and what it leaves alone."""

from __future__ import annotations

import pytest

from steerserve.lab.lexicon import Lexicon


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.profanity()


@pytest.mark.parametrize(
    "text",
    [
        "fuck", "FUCK", "Fuck!", "(fuck)", "'fuck'", "what the fuck, man", "#bitches", "@asshole hi", "fuckin'",
        "the bitch's", "the bitch’s", "don't give a shit.",
        "sh1t", "5hit", "a$$", "a55", "b!tch", "@bitch", "fUcK", "d1ckhe4d",
        "f**k", "f*ck", "b*tch", "sh*t", "sh**", "f*cking", "SH*T",
        "fuuuuck", "shiiiit", "asssss", "bitchhhh", "shiiittt",
    ],
)  # fmt: skip
def test_listed_words_in_the_spellings_people_use(lexicon: Lexicon, text: str) -> None:
    assert lexicon.matches(text)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "*** --- !!!", "class", "assess", "cocktail", "Scunthorpe", "shitake", "Dickens", "pass the bass",
        "a peacock", "mass", "Massachusetts", "shoe", "horseshoe", "analysis", "sextet", "therapist", "arsenal",
        "455", "flight 455 at 4:55", "5 * 7", "a*b*c", "**bold**", "*emphasis*", "s*t", "so cooool", "aaaas", "fu",
        "circumstance", "document", "titan", "button", "can't", "rock'n'roll", "duck", "ship it", "faking",
    ],
)  # fmt: skip
def test_other_words_are_left_alone(lexicon: Lexicon, text: str) -> None:
    assert not lexicon.matches(text)
    assert lexicon.spans(text) == []


def test_spans_are_the_words_in_the_text_as_written(lexicon: Lexicon) -> None:
    text = "Oh sh1t, this classy b*tch says FUUUUCK (fuck)"
    assert [text[start:end] for start, end in lexicon.spans(text)] == ["sh1t", "b*tch", "FUUUUCK", "fuck"]


def test_the_parts_share_no_word_and_make_the_whole() -> None:
    selection, held_out = Lexicon.profanity("selection"), Lexicon.profanity("held_out")
    assert selection.forms
    assert held_out.forms
    assert not selection.forms & held_out.forms
    assert selection.forms | held_out.forms == Lexicon.profanity().forms
    assert not held_out.matches("fuck this")
    assert not selection.matches("what a bastard")


def test_every_listed_form_is_found_in_any_case(lexicon: Lexicon) -> None:
    for form in lexicon.forms:
        assert lexicon.matches(f"You {form}, sir"), form
        assert lexicon.matches(form.upper()), form


def test_a_mask_stands_for_letters_of_longer_words_only() -> None:
    lexicon = Lexicon(frozenset({"word", "abc"}))
    assert lexicon.matches("w*rd")
    assert not lexicon.matches("a*c")  # three letters: too much else it could be
    assert not lexicon.matches("w***")  # one letter is no evidence
    assert not lexicon.matches("w**rd")  # a star is one letter
