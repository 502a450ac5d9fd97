"""Harvest: what is on disk is what the model computed, once, whatever interrupted it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerserve.errors import AssetError, IncompatibleError
from steerserve.lab import harvest as harvesting
from steerserve.lab.activations import activations_of, pack_contexts
from steerserve.lab.harvest import HarvestConfig, harvest
from steerserve.lab.manifest import Manifest
from steerserve.models.loading import LoadedModel
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)
SITES = (Site(0, Stream.RESID_PRE), Site(1, Stream.MLP_OUT), SITE)
CONFIG = HarvestConfig(SITES, context_length=16, batch_size=3)


def oracle(model: LoadedModel, tokens: torch.Tensor) -> dict[Site, torch.Tensor]:
    """The same activations from Hugging Face's own records and a plain hook."""
    caught: list[torch.Tensor] = []
    layer = model.model.get_submodule("model.layers.1")
    handle = layer.mlp.register_forward_hook(lambda _module, _args, output: caught.append(output))
    with torch.no_grad():
        hidden = model.model(tokens.long(), output_hidden_states=True).hidden_states
    handle.remove()
    return dict(zip(SITES, (hidden[0], caught[0], hidden[2]), strict=True))


@pytest.fixture
def contexts(token_id) -> Callable[[list[str]], torch.Tensor]:
    """Texts, character by character, each followed by the end token, in full rows of 16."""

    def contexts(texts: list[str]) -> torch.Tensor:
        ids = [token for text in texts for token in [*map(token_id, text), 256]]
        return torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)

    return contexts


def test_contexts_are_the_texts_joined_by_the_end_token(tiny: LoadedModel, contexts, sentences: list[str]) -> None:
    packed = torch.stack(list(pack_contexts(tiny, sentences, 16)))
    assert torch.equal(packed.long(), contexts(sentences))


def test_activations_are_the_models_own(tiny: LoadedModel, contexts, sentences: list[str]) -> None:
    tokens = contexts(sentences[:3])
    expected = oracle(tiny, tokens)
    captured = activations_of(tiny, tokens, SITES)
    assert captured.keys() == expected.keys()
    for site in SITES:
        torch.testing.assert_close(captured[site], expected[site], rtol=0, atol=0)


def test_a_reading_leaves_no_hook_behind(tiny: LoadedModel, contexts, sentences: list[str]) -> None:
    tokens = contexts(sentences[:1])
    before = tiny.model(tokens).logits
    activations_of(tiny, tokens, SITES)
    assert torch.equal(tiny.model(tokens).logits, before)  # a pass runs to its end again


def test_harvest_keeps_every_ordinary_row(tiny: LoadedModel, tmp_path: Path, contexts, sentences: list[str]) -> None:
    manifest = harvest(tiny, sentences, tmp_path, CONFIG)
    tokens = contexts(sentences)
    expected = oracle(tiny, tokens)
    assert manifest.num_tokens == tokens.numel()
    assert manifest.num_rows == len(tokens) * 15  # all but the first position of each context
    (shard,) = (load_file(tmp_path / name) for name in manifest.shards)
    assert torch.equal(shard["tokens"].long(), tokens[:, 1:].flatten())
    for site in SITES:
        rows = expected[site][:, 1:].flatten(0, 1)
        assert shard[str(site)].dtype == torch.bfloat16
        torch.testing.assert_close(shard[str(site)].float(), rows, rtol=2**-7, atol=1e-5)


def test_a_massive_row_is_dropped_at_every_site(
    with_massive_x: LoadedModel, tmp_path: Path, contexts, sentences: list[str], token_id
) -> None:
    texts = [text.replace("e", "X") for text in sentences]
    manifest = harvest(with_massive_x, texts, tmp_path, CONFIG)
    tokens = contexts(texts)[:, 1:].flatten()
    massive = tokens == token_id("X")
    assert 0 < massive.sum() < len(tokens) // 4
    shard = load_file(tmp_path / manifest.shards[0])
    assert torch.equal(shard["tokens"].long(), tokens[~massive])
    assert all(len(shard[str(site)]) == len(shard["tokens"]) == manifest.num_rows for site in SITES)


@pytest.mark.parametrize(("max_tokens", "num_contexts"), [(0, 30), (16, 1), (48, 3), (50, 4), (10_000, 30)])
def test_max_tokens_counts_whole_contexts(
    tiny: LoadedModel, tmp_path: Path, max_tokens: int, num_contexts: int
) -> None:
    texts = ["x" * 95] * 5  # 6 contexts each
    assert harvest(tiny, texts, tmp_path, replace(CONFIG, max_tokens=max_tokens)).num_tokens == 16 * num_contexts


@pytest.mark.parametrize("shards_before", [0, 1, 3])
def test_an_interrupted_harvest_continues_to_the_same_bytes(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_before: int, sentences: list[str]
) -> None:
    monkeypatch.setattr(harvesting, "CONTEXTS_PER_SHARD", 5)
    texts = sentences[:14]
    whole = harvest(tiny, texts, tmp_path / "whole", CONFIG)
    assert len(whole.shards) > 4
    write, written = harvesting.save_file, []

    def write_or_be_killed(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if len(written) == shards_before:
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path)
        write(tensors, path)

    monkeypatch.setattr(harvesting, "save_file", write_or_be_killed)
    with pytest.raises(KeyboardInterrupt):
        harvest(tiny, texts, tmp_path / "parts", CONFIG)
    monkeypatch.setattr(harvesting, "save_file", write)
    harvest(tiny, texts, tmp_path / "parts", CONFIG)
    for file in (*whole.shards, "manifest.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_finished_harvest_is_left_alone(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentences: list[str]
) -> None:
    first = harvest(tiny, sentences, tmp_path, CONFIG)
    monkeypatch.setattr(harvesting, "save_file", lambda *_: pytest.fail("wrote a shard again"))
    assert harvest(tiny, sentences, tmp_path, CONFIG) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": SITES[:1]}, "holds a harvest with sites"),
        ({"context_length": 8}, "holds a harvest with context_length 16, not 8"),
    ],
)
def test_a_harvest_of_something_else_is_not_continued(
    tiny: LoadedModel, tmp_path: Path, sentences: list[str], change: dict[str, object], message: str
) -> None:
    harvest(tiny, sentences, tmp_path, CONFIG)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(AssetError, match=message):
        harvest(tiny, sentences, tmp_path, replace(CONFIG, **change))
    with pytest.raises(AssetError, match="holds a harvest with model_fingerprint"):
        harvest(replace(tiny, fingerprint="0" * 64), sentences, tmp_path, CONFIG)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_site_outside_the_model_is_refused(tiny: LoadedModel, tmp_path: Path, sentences: list[str]) -> None:
    with pytest.raises(IncompatibleError, match=r"blocks\.3\.hook_resid_post.*a layer below 3"):
        harvest(tiny, sentences, tmp_path, replace(CONFIG, sites=(SITE, Site(3, Stream.RESID_POST))))


def test_a_directory_without_a_usable_harvest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="holds no harvest"):
        Manifest.load(tmp_path)
    for content in ("{", "[]", '{"shards": []}', json.dumps({"more": 1})):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(AssetError, match=r"manifest\.json is damaged"):
            Manifest.load(tmp_path)
