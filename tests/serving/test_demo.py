"""The demo's numbers and pictures, on a real server whose policy forces a known token."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from steerserve import ConceptTarget, Intervention, Op, demo
from steerserve.display import heat_strip, peak, token_scores
from steerserve.errors import AssetError

PROMPTS = ["The weather is", "She told him", "We went to"]


@pytest.fixture
def mood_demo(monkeypatch) -> None:
    """The demo on the tiny model's pack; its policy forces " Pre", which stands for a profane word."""
    monkeypatch.setattr(demo, "CONCEPT", "mood")
    monkeypatch.setattr(demo, "MONITOR", Intervention(ConceptTarget("mood"), Op.MONITOR))
    monkeypatch.setattr(demo, "MAX_TOKENS", 6)


def rates(unguarded: list[int], guarded: list[int]) -> demo.Rates:
    return demo.Rates(np.array(unguarded), np.array(guarded), num_seeds=2)


def test_reduction_and_its_interval() -> None:
    measured = rates([2, 1, 2, 0, 2, 1] * 10, [0, 1, 0, 0, 0, 0] * 10)
    reduction = measured.reduction()
    assert reduction.value == 1 - 10 / 80
    assert 0.7 < reduction.low < reduction.value < reduction.high < 1.0
    assert measured.reduction() == reduction


def test_a_policy_that_removes_everything_has_a_certain_reduction() -> None:
    reduction = rates([1, 2, 1], [0, 0, 0]).reduction()
    assert (reduction.low, reduction.high) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (rates([2, 1], [0, 1]), ["3 of 4", "75.0%", "25.0%", "reduction 66.7%, 95 % interval"]),
        (rates([0, 0], [0, 0]), ["0 of 4", "nothing to reduce"]),
    ],
)
def test_rates_are_shown_with_their_counts(measured, expected) -> None:
    shown = io.StringIO()
    demo.show_rates(measured, Console(file=shown, width=100))
    for text in expected:
        assert text in shown.getvalue()


@pytest.mark.parametrize(
    ("prompt", "continuation", "profane"),
    [
        ("What the", " fuck is this", True),
        ("What the fu", "ck is this", True),
        ("What the fuck", " is this", False),
        ("They live in Scunt", "horpe", False),
        ("A", " nice day", False),
    ],
)
def test_only_the_continuation_is_judged_joined_at_the_word(prompt, continuation, profane) -> None:
    assert demo.is_profane(prompt, continuation) is profane


def test_rates_count_each_prompt_both_ways(client, mood_demo, monkeypatch) -> None:
    monkeypatch.setattr(demo, "is_profane", lambda prompt, continuation: " Pre Pre" in continuation)
    measured = demo.measure_rates(client, PROMPTS, Console(file=io.StringIO()))
    assert measured.unguarded.tolist() == [0, 0, 0]
    assert measured.guarded.tolist() == [2, 2, 2]


def test_side_by_side_shows_both_answers_and_the_receipt(client, mood_demo) -> None:
    shown = io.StringIO()
    demo.show_side_by_side(client, PROMPTS[0], Console(file=shown, width=100))
    for expected in (PROMPTS[0], "unguarded", "policy mood", " Pre Pre Pre", "policy:mood@1", "receipt: steered"):
        assert expected in shown.getvalue()


def test_each_token_is_coloured_by_the_score_at_its_own_position(client) -> None:
    monitor = Intervention(ConceptTarget("mood"), Op.MONITOR)
    pieces = list(
        client.generate_stream("Hello", steer=[monitor], max_tokens=6, seed=0, ignore_eos=True, return_activations=True)
    )
    by_position = {at.position: at.scores[0] for piece in pieces for at in piece.scores}
    first = pieces[-1].num_prompt_tokens
    tokens = token_scores(pieces)
    assert [token.text for token in tokens] == [piece.text for piece in pieces]
    scores = [token.score for token, piece in zip(tokens, pieces, strict=True) if piece.token_ids]
    assert scores == [by_position[first + i] for i in range(6)]
    strip = heat_strip(tokens, peak(tokens))
    hot = [token for token in tokens if token.score > 0 and token.text]
    assert len([span for span in strip.spans if span.style.bgcolor]) == len(hot) > 0


@pytest.mark.parametrize("line", ["", "not json", json.dumps({"text": "x"}), json.dumps(["x"])])
def test_a_file_without_prompts_is_refused(tmp_path, line) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n" + line if line else "")
    with pytest.raises(AssetError, match="prompt"):
        demo.read_prompts(tmp_path / "prompts.jsonl")


def test_a_server_that_does_not_start_says_why(monkeypatch) -> None:
    monkeypatch.setattr(demo, "MODEL", "/no/such/model")
    with pytest.raises(AssetError, match="neither a directory"), demo.running_server(Console(file=io.StringIO())):
        pass
