"""Moderation reads the loaded concepts as the engine does, and says which text shows which."""

from __future__ import annotations

import math

import openai
import pytest

from steerserve import ConceptTarget, Guard, GuardAction, SteerserveClient
from steerserve.types import Phase

TEXTS = ["The weather is fine.", "Who are you, and what do you want of me?"]


def largest_score(address: str, text: str) -> float:
    guard = Guard(ConceptTarget("mood"), -1e38, GuardAction.FLAG, phase=Phase.PROMPT)
    with SteerserveClient(address) as client:
        return max(event.score for event in client.generate(text, guards=[guard], max_tokens=1).guard_events)


def test_scores_are_those_of_the_engine_between_0_and_1(openai_client, http_server) -> None:
    reply = openai_client.moderations.create(model="tiny-llama", input=TEXTS)
    assert len(reply.results) == 2
    for text, result in zip(TEXTS, reply.results, strict=True):
        score = largest_score(http_server.address, text)
        assert result.steerserve["mood"]["score"] == pytest.approx(score, rel=1e-4, abs=1e-6)
        share = result.category_scores.model_extra["mood"]
        assert share == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-4)  # the card's threshold is 0
        assert result.categories.model_extra["mood"] is result.flagged is (score > 0)
        start, end = result.steerserve["mood"]["characters"]
        assert 0 <= start < end <= len(text)


@pytest.mark.parametrize("text", ["x", [{"type": "text", "text": "x"}], ["", "x"]])
def test_every_form_of_input(openai_client, text) -> None:
    results = openai_client.moderations.create(model="tiny-llama", input=text).results
    assert len(results) == (2 if text == ["", "x"] else 1)
    if len(results) == 2:
        assert results[0].category_scores.model_extra["mood"] == 0


def test_a_text_longer_than_the_model_is_read_to_its_end(start_server, tiny) -> None:
    with (
        start_server(tiny.config(http={"port": 0}), max_model_len=64) as server,
        openai.OpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=0) as client,
    ):
        texts = [" ".join(["calm"] * i + ["storm"] + ["calm"] * (300 - i)) for i in (0, 299)]
        results = client.moderations.create(model=None, input=texts).results
    assert [result.steerserve["mood"]["score"] is not None for result in results] == [True, True]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"] * 65}, "input"),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, "input[0].type"),
        ({}, "input"),
        ({"input": "x", "threshold": 1}, "threshold"),
    ],
)
def test_a_wrong_input_is_refused(openai_client, body, param) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        openai_client.post("/moderations", body=body, cast_to=object)
    assert raised.value.param == param
