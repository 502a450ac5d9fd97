"""Loading: facts of the model, a fingerprint of its weights alone, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steerserve.errors import AssetError, IncompatibleError
from steerserve.models.loading import checkpoint_fingerprint, load_model


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_model_dir("llama"), tmp_path / "copy"))


def test_facts_of_a_loaded_model(model_dir) -> None:
    model = load_model(str(model_dir), torch.bfloat16)
    assert (model.name, model.d_model, model.n_layers, model.vocab_size, model.max_context) == ("copy", 32, 3, 260, 256)
    assert model.eos_token_ids == {256}
    assert model.model.dtype is torch.bfloat16
    assert not model.model.training


def test_fingerprint_is_of_the_weights_whatever_the_dtype_or_the_files(model_dir, tmp_path) -> None:
    fingerprint = load_model(str(model_dir), torch.float32).fingerprint
    assert load_model(str(model_dir), torch.bfloat16).fingerprint == fingerprint
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert checkpoint_fingerprint(tmp_path / "sharded") == fingerprint
    (model_dir / "config.json").write_text((model_dir / "config.json").read_text() + "\n")
    assert checkpoint_fingerprint(model_dir) == fingerprint


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_fingerprint_sees_every_change_of_a_tensor(change, model_dir) -> None:
    before = checkpoint_fingerprint(model_dir)
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    match change:
        case "value":
            norm[0] += 1
            tensors["model.norm.weight"] = norm
        case "name":
            tensors["model.norm.bias"] = norm
        case "dtype":
            tensors["model.norm.weight"] = norm.view(torch.int32)
        case "shape":
            tensors["model.norm.weight"] = norm[None]
    save_file(tensors, file, metadata={"format": "pt"})
    assert checkpoint_fingerprint(model_dir) != before


def test_missing_models_say_what_to_do() -> None:
    with pytest.raises(AssetError, match=r"offline.*config\.json"):
        load_model("/no/such/directory", torch.float32)


def test_incomplete_weights_are_refused_not_invented(model_dir) -> None:
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"incomplete.*model\.norm\.weight"):
        load_model(str(model_dir), torch.float32)


@pytest.mark.parametrize("length", [0, 5, 100])
def test_damaged_weights_are_refused(length, model_dir) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(AssetError, match="safetensors"):
        load_model(str(model_dir), torch.float32)


def test_truncated_weights_are_refused(model_dir) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AssetError):
        load_model(str(model_dir), torch.float32)


def test_pickled_weights_are_refused(model_dir) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    torch.save(tensors, model_dir / "pytorch_model.bin")
    with pytest.raises(AssetError, match="safetensors weights only"):
        load_model(str(model_dir), torch.float32)


@pytest.mark.parametrize(("config", "error"), [("[]", AssetError), ("{", AssetError), (None, AssetError)])
def test_damaged_configs_are_refused(config, error, model_dir) -> None:
    (model_dir / "config.json").unlink()
    if config is not None:
        (model_dir / "config.json").write_text(config)
    with pytest.raises(error, match=r"config\.json"):
        load_model(str(model_dir), torch.float32)


def test_unknown_families_and_remote_code_are_refused(model_dir) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"model_type": "surprise", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (model_dir / "config.json").write_text(json.dumps(config))
    (model_dir / "evil.py").write_text("raise SystemExit('ran foreign code')")
    with pytest.raises(IncompatibleError) as caught:
        load_model(str(model_dir), torch.float32)
    assert caught.value.field == "model.model_type"
