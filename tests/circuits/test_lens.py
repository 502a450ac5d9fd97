"""The lens at the last layer is the model, at the first it is the embeddings."""

from __future__ import annotations

import json

import pytest
import torch

from steerserve.circuits.forward import all_last_logits
from steerserve.circuits.lens import layer_labels, read_layers, residual_sites
from steerserve.circuits.metrics import log_odds


def test_the_last_reading_is_the_model_itself(load_exact, make_pairs) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    lens = read_layers(model, pairs, "log_odds")
    logits = all_last_logits(model, pairs.clean, pairs.last)
    p = logits.softmax(-1)
    last = lens.readings[-1]
    assert last.kl == pytest.approx(0, abs=1e-9)
    assert last.value == pytest.approx(log_odds(pairs)(logits).item(), rel=1e-9)
    assert last.p_correct == pytest.approx(sum(p[i, of[0]].item() for i, of in enumerate(pairs.correct)) / 3, rel=1e-5)
    assert last.p_wrong == pytest.approx(sum(p[i, of[0]].item() for i, of in enumerate(pairs.wrong)) / 3, rel=1e-5)
    assert last.top[0] == model.tokenizer.decode([int(p.mean(0).argmax())])


def test_the_first_reading_is_of_the_last_tokens_embedding(load_exact, make_pairs) -> None:
    model, pairs = load_exact("llama"), make_pairs()
    first = read_layers(model, pairs, "log_odds").readings[0]
    embedded = model.model.get_input_embeddings()(pairs.clean[torch.arange(3), pairs.last])
    logits = model.model.get_output_embeddings()(model.model.model.norm(embedded))
    assert first.site == "blocks.0.hook_resid_pre"
    assert first.value == pytest.approx(log_odds(pairs)(logits).item(), rel=1e-9)
    assert first.kl > 0.01


def test_every_layer_has_a_reading_and_a_label(load_exact, make_pairs) -> None:
    model = load_exact("gpt2")
    lens = read_layers(model, make_pairs(), "logit_difference")
    assert [reading.site for reading in lens.readings] == list(map(str, residual_sites(model)))
    assert layer_labels(model) == ["emb", "0", "1"]
    assert json.loads(json.dumps(lens.to_dict()))["readings"][2]["site"] == "blocks.1.hook_resid_post"
