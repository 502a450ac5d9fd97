"""One prompt, seen through SAEs whose effect is known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerserve.errors import AssetError, InvalidRequestError
from steerserve.lab.activations import activations_of
from steerserve.lab.commands.inspect import reading_table
from steerserve.lab.html import render
from steerserve.lab.inspection import inspect_prompt, read_features
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

PROMPT = "A small river <b>&"


def test_features_of_each_token_against_the_sae(tiny: LoadedModel, random_sae: SAE) -> None:
    inspection = inspect_prompt(tiny, [random_sae], PROMPT, num_features=4)
    tokens = torch.tensor([tiny.tokenizer(PROMPT).input_ids])
    x = activations_of(tiny, tokens, (random_sae.site,))[random_sae.site][0]
    f = random_sae.encode(x)
    assert "".join(inspection.tokens) == PROMPT
    first, *rest = inspection.readings[0].tokens
    assert (first.features, first.error) == ((), None)
    for at, reading in enumerate(rest, 1):
        best = f[at].topk(4)
        assert [each.id for each in reading.features] == best.indices[best.values > 0].tolist()
        assert reading.num_active == int((f[at] > 0).sum())
        error = (x[at] - random_sae.reconstruct(x[at])).square().sum() / x[at].square().sum()
        assert reading.error == pytest.approx(error.item(), rel=1e-4)
    assert sum(reading.num_active for reading in rest) > 20


def test_replacing_against_a_forward_pass_by_hand(tiny: LoadedModel, random_sae: SAE) -> None:
    inspection = inspect_prompt(tiny, [random_sae], PROMPT, replace=True)
    tokens = torch.tensor([tiny.tokenizer(PROMPT).input_ids])

    def splice(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1], random_sae.reconstruct(x[:, 1:])], 1)

    with torch.inference_mode():
        clean = tiny.model(tokens).logits[0].double().log_softmax(-1)
        with transformed(tiny, {random_sae.site: splice}):
            replaced = tiny.model(tokens).logits[0].double().log_softmax(-1)
    kl = (clean.exp() * (clean - replaced)).sum(-1)
    assert kl[1:].min() > 1e-3
    run = inspection.runs[1]
    assert run.saes == ("random",)
    torch.testing.assert_close(torch.tensor([p.kl for p in run.predictions]).double(), kl, rtol=1e-3, atol=1e-6)
    assert run.predictions[3].top[0][1] == pytest.approx(replaced[3].exp().max().item(), rel=1e-4)
    assert run.predictions[3].actual == pytest.approx(replaced[3, tokens[0, 4]].item(), rel=1e-4)
    assert run.predictions[-1].actual is None
    assert {p.kl for p in inspection.runs[0].predictions} == {0.0}


def test_several_saes_are_replaced_singly_and_together(tiny: LoadedModel, random_sae: SAE, lossless_sae: SAE) -> None:
    later = replace(random_sae, name="later", site=Site(2, Stream.RESID_POST))
    inspection = inspect_prompt(tiny, [lossless_sae, later], PROMPT, replace=True)
    _, lossless, alone, together = inspection.runs
    assert max(p.kl for p in lossless.predictions) < 1e-6
    assert together.saes == ("lossless", "later")
    for one, both in zip(alone.predictions, together.predictions, strict=True):
        assert both.kl == pytest.approx(one.kl, rel=1e-3, abs=1e-6)
    assert max(p.kl for p in alone.predictions) > 1e-3


def test_the_page_shows_every_token_escaped(tiny: LoadedModel, random_sae: SAE) -> None:
    prompt = "</script><img onerror=x>"
    page = render("inspect", inspection=inspect_prompt(tiny, [random_sae], prompt, replace=True))
    assert "<img" not in page
    assert page.count('class="step"') == len(prompt)
    assert "KL" in page
    assert not re.search(r"https?:|src=", page)


def test_largest_activations_come_from_features_json(tiny: LoadedModel, random_sae: SAE, tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    entries = [{"id": feature, "max": 10.0} for feature in range(48)]
    path.write_text(json.dumps({"sae": {"sha256": random_sae.sha256}, "features": entries}))
    inspection = inspect_prompt(tiny, [random_sae], PROMPT, known=read_features([path]))
    shown = [each for reading in inspection.readings[0].tokens for each in reading.features]
    assert shown
    assert all(each.share == pytest.approx(each.activation / 10) for each in shown)
    path.write_text("{}")
    with pytest.raises(AssetError, match=r"features\.json is no features\.json"):
        read_features([path])


@pytest.mark.parametrize("prompt", ["", "x" * 257])
def test_a_prompt_that_cannot_be_run(tiny: LoadedModel, random_sae: SAE, prompt: str) -> None:
    with pytest.raises(InvalidRequestError, match="between 1 and 256 tokens"):
        inspect_prompt(tiny, [random_sae], prompt)


def test_the_table_tells_nothing_from_nowhere(tiny: LoadedModel, random_sae: SAE) -> None:
    """No feature fires anywhere, and only the first position is outside what the SAE is for."""
    silent = replace(random_sae, threshold=torch.full((48,), 1e6))
    inspection = inspect_prompt(tiny, [silent], PROMPT)
    (_, active, error, strongest) = reading_table(inspection, inspection.readings[0]).columns
    assert [str(cell) for cell in strongest.cells] == ["outside the SAE"] + ["none"] * (len(inspection.tokens) - 1)
    assert set(active.cells) == {"0"}
    assert [cell == "–" for cell in error.cells] == [True] + [False] * (len(inspection.tokens) - 1)
