"""Packs survive the disk and are refused when damaged or made for another model."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from steerserve.errors import AssetError, IncompatibleError
from steerserve.sae.formats.saelens import save_sae
from steerserve.steering import catalog as catalog_module
from steerserve.steering.catalog import Catalog
from steerserve.steering.pack_files import load_pack, save_pack
from steerserve.steering.packs import PackTensors


def test_a_pack_survives_the_disk(card, make_tensors, tmp_path) -> None:
    saved = save_pack(card, make_tensors(), tmp_path / "p")
    loaded = load_pack(tmp_path / "p")
    assert loaded.card == saved.card == card.model_copy(update={"tensors_sha256": saved.card.tensors_sha256})
    assert (loaded.name, loaded.tag, loaded.sha256) == ("mood", "mood@2", saved.sha256)
    for tensor in fields(PackTensors):
        expected = getattr(make_tensors(), tensor.name)
        np.testing.assert_array_equal(getattr(loaded.tensors, tensor.name), expected)
    (site,) = loaded.sites
    assert loaded.rows(site).keys == ((f"pack:{loaded.sha256}", 0), (f"pack:{loaded.sha256}", 1))


def test_the_hash_covers_both_files(make_pack, tmp_path) -> None:
    pack = make_pack()
    directory = tmp_path / "mood"
    directory.joinpath("card.json").write_text(directory.joinpath("card.json").read_text().replace("test", "best"))
    assert load_pack(directory).sha256 != pack.sha256


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "steerserve.pack/1"}, "format: .*has to be built again"),
        ({"name": "two words"}, "name"),
        ({"version": 1}, "version"),
        ({"sites": ["layer 3"]}, "sites"),
        ({"sites": []}, "sites"),
        ({"sites": ["blocks.2.mlp.hook_in"]}, "harvested, not steered"),
        ({"sites": ["blocks.2.hook_resid_post", "blocks.1.hook_resid_post"]}, "model order"),
        ({"sites": ["blocks.2.hook_resid_post", "model.layers.2"]}, "each once"),
        ({"sites": ["blocks.1.hook_resid_post"]}, "named elsewhere in the card"),
        ({"detector": {"kind": "features", "site": "blocks.2.hook_resid_post", "threshold": "high"}}, "threshold"),
        ({"detector": {"kind": "guess", "site": "blocks.2.hook_resid_post", "threshold": 1.0}}, "detector.kind"),
        ({"policy": {"op": "explode"}}, "policy.op"),
        ({"policy": {"op": "block", "always": True}}, "always is for clamp"),
        ({"model": {"name": "toy", "fingerprint": "short"}}, "model.fingerprint"),
        ({"saes": {}}, "names none"),
        ({"extra": 1}, "extra"),
    ],
)
def test_wrong_cards_are_refused(change, complaint, make_pack, tmp_path) -> None:
    make_pack()
    card = tmp_path / "mood" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | change))
    with pytest.raises(AssetError, match=complaint):
        load_pack(tmp_path / "mood")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"b_enc": np.zeros(3, np.float32)}, "b_enc: float32 .3., expected float32 .2."),
        ({"W_dec": np.zeros((2, 7), np.float32)}, "W_dec"),
        ({"W_enc": np.zeros(2, np.float32)}, "W_enc"),
        ({"W_enc": np.zeros((0, 8), np.float32)}, "W_enc"),
        ({"weight": np.zeros(2, np.float64)}, "weight: float64"),
        ({"value": np.array([1, np.nan], np.float32)}, "value: NaN"),
        ({"threshold": np.array([1, np.inf], np.float32)}, "threshold: NaN or infinite"),
        ({"feature_ids": np.array([3, 3])}, "twice"),
        ({"max_activation": np.array([1, 0], np.float32)}, "max_activation: expected values above 0"),
        ({"site": np.array([0, 1])}, "site: names .0, 1."),
        ({"weight": np.zeros(2, np.float32)}, "reads nothing"),
        ({"edited": np.zeros(2, bool)}, "edited: no row"),
        ({"edited": np.array([True, False]), "weight": np.array([1, 0], np.float32)}, "row 1 is neither"),
        ({"surplus": np.zeros(2, np.float32)}, "surplus"),
    ],
)
def test_wrong_tensors_are_refused(change, complaint, make_pack, tmp_path) -> None:
    make_pack()
    file = tmp_path / "mood" / "pack.safetensors"
    save_file(load_file(file) | change, file)
    with pytest.raises(AssetError, match=complaint):
        load_pack(tmp_path / "mood")


def test_damaged_or_missing_files_are_refused(make_pack, tmp_path) -> None:
    make_pack()
    file = tmp_path / "mood" / "pack.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AssetError, match="damaged"):
        load_pack(tmp_path / "mood")
    file.unlink()
    with pytest.raises(AssetError, match=r"pack\.safetensors"):
        load_pack(tmp_path / "mood")


def test_parts_of_two_packs_are_not_taken_for_one(card, make_tensors, tmp_path) -> None:
    """What a reader finds, or a kill leaves, while a pack is replaced; a card that names no tensors is believed."""
    for number, file in enumerate(("pack.safetensors", "card.json")):
        directory = tmp_path / str(number)
        save_pack(card, make_tensors(), directory)
        old = (directory / file).read_bytes()
        save_pack(card, make_tensors(value=np.array([3, 0], np.float32)), directory)
        (directory / file).write_bytes(old)
        with pytest.raises(AssetError, match=r"pack\.safetensors has SHA-256 \w+, but card\.json belongs to one with"):
            load_pack(directory)
        (directory / "card.json").write_text(card.model_dump_json())
        assert load_pack(directory).card == card


def test_a_pack_that_cannot_be_written_leaves_the_old_one(card, make_tensors, tmp_path, monkeypatch) -> None:
    before = save_pack(card, make_tensors(), tmp_path / "p")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", fail)
        with pytest.raises(OSError, match="no space"):
            save_pack(card, make_tensors(value=np.array([3, 0], np.float32)), tmp_path / "p")
    assert load_pack(tmp_path / "p").sha256 == before.sha256
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["card.json", "pack.safetensors"]


def test_invalid_tensors_are_not_written(card, make_tensors, tmp_path) -> None:
    with pytest.raises(AssetError, match="value"):
        save_pack(card, make_tensors(value=np.array([np.inf, 0], np.float32)), tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"fingerprint": "0" * 64}, "pack.model.fingerprint"),
        ({"d_model": 16}, "pack.W_enc"),
        ({"n_layers": 2}, "pack.sites"),
    ],
)
def test_a_pack_for_another_model_is_refused(change, field, facts, make_pack, tmp_path) -> None:
    make_pack()
    with pytest.raises(IncompatibleError) as caught:
        Catalog.load(replace(facts, **change), packs=[str(tmp_path / "mood")])
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"d_model": 16}, "sae.d_in"),
        ({"n_layers": 2}, "sae.site"),
        ({"fingerprint": "0" * 64}, "sae.metadata.model_fingerprint"),
    ],
)
def test_an_sae_for_another_model_is_refused(change, field, facts, sae, tmp_path) -> None:
    save_sae(replace(sae, metadata={"model_fingerprint": facts.fingerprint}), tmp_path / "toy-sae")
    with pytest.raises(IncompatibleError) as caught:
        Catalog.load(replace(facts, **change), saes=[str(tmp_path / "toy-sae")])
    assert caught.value.field == field


def test_an_sae_whose_features_depend_on_one_another_is_not_served(facts, sae, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(catalog_module, "load_sae", lambda path: replace(sae, name=path.name, k=4))
    (tmp_path / "topk").mkdir()
    with pytest.raises(IncompatibleError) as caught:
        Catalog.load(facts, saes=[str(tmp_path / "topk")])
    assert caught.value.field == "sae"
    assert "topk is a TopK SAE (k = 4)" in caught.value.expected


def test_catalog_loads_by_path_and_refuses_unknown_names_and_doubles(facts, sae, make_pack, tmp_path) -> None:
    make_pack()
    save_sae(sae, tmp_path / "toy-sae")
    pack_dir = str(tmp_path / "mood")
    catalog = Catalog.load(facts, packs=[pack_dir], saes=[str(tmp_path / "toy-sae")])
    assert (list(catalog.packs), list(catalog.saes)) == (["mood"], ["toy-sae"])
    with pytest.raises(AssetError, match="built-in packs"):
        Catalog.load(facts, packs=["no-such-pack"])
    with pytest.raises(AssetError, match="two loaded"):
        Catalog.load(facts, packs=[pack_dir, pack_dir])
