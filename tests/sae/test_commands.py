"""``steerserve sae inspect | convert | verify``, on golden files and a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from steerserve import cli
from steerserve.errors import AssetError, IncompatibleError
from steerserve.lab.commands.sae import norm_gain
from steerserve.lab.verification import Declared, implausible
from steerserve.models.loading import load_model
from steerserve.sae.formats.saelens import save_sae
from steerserve.sae.model import SAE, Normalisation
from steerserve.sae.registry import load_sae
from steerserve.types import Site, Stream

GOLDEN = Path(__file__).parent / "golden"
WIDTH = 32


def sae(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["sae", *map(str, arguments)], env={"COLUMNS": "300"})


@pytest.fixture
def model(tiny_model_dir: Callable[[str], Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{number}: the quick brown fox, {number * 7919} times over\n" for number in range(40)))
    return path


def lossless(**changes: Any) -> SAE:
    """x = relu(x) − relu(−x): of two features a coordinate, one is active."""
    eye, zeros = torch.eye(WIDTH), torch.zeros(2 * WIDTH)
    W_dec = torch.cat([eye, -eye])
    plain = SAE("lossless", Site(1, Stream.RESID_POST), W_dec.T, zeros, W_dec, torch.zeros(WIDTH), zeros)
    return replace(plain, **changes)


def test_inspect_tells_what_a_file_is() -> None:
    result = sae("inspect", GOLDEN / "sae_lens/topk_layer_norm")
    assert result.exit_code == 0, result.output
    sha256 = load_sae(GOLDEN / "sae_lens/topk_layer_norm").sha256
    for said in (
        "SAELens", sha256, "TopK, k = 4", "8 → 24 features → 8; 440 parameters", "blocks.1.hook_resid_post",
        "layer_norm", "tiny", "not possible: topk_layer_norm is a TopK SAE",
    ):  # fmt: skip
        assert said in result.output


def test_options_reach_the_loader() -> None:
    assert sae("inspect", GOLDEN / "sae_lens/standard_expected_average").exit_code == 2
    options = ("--norm-scaling-factor", "0.5", "--site", "blocks.1.hook_resid_post")
    assert sae("inspect", GOLDEN / "sae_lens/standard_expected_average", *options).exit_code == 0
    options = ("--norm-scaling-factor", "0.5", "--site", "blocks.2.hook_resid_post")
    result = sae("inspect", GOLDEN / "sae_lens/standard_expected_average", *options)
    assert result.exit_code == 2
    assert "blocks.2.hook_resid_post was asked for" in result.output


def test_a_hub_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **_: str(GOLDEN / "sparsify/topk"))
    result = sae("inspect", "layers.10", "--repo", "org/saes")
    assert result.exit_code == 0, result.output
    assert "sparsify" in result.output


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_convert_writes_what_computes_the_same(tmp_path: Path, dtype: str) -> None:
    source, out = GOLDEN / "dictionary_learning/gated", tmp_path / "out"
    result = sae("convert", source, out, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert "outputs differ by" in result.output
    before, after = load_sae(source), load_sae(out)
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    torch.testing.assert_close(after.W_dec, before.W_dec, rtol=tolerance, atol=tolerance)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    again = sae("convert", source, out)
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_convert_leaves_nothing_behind_when_the_dtype_cannot_hold_the_weights(tmp_path: Path) -> None:
    large = lossless(W_enc=1e6 * lossless().W_enc)
    save_sae(large, tmp_path / "large", torch.float32)
    result = sae("convert", tmp_path / "large", tmp_path / "out", "--dtype", "float16")
    assert result.exit_code == 2
    assert "holds NaN or infinity" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


def test_verify_measures_and_compares(model: Path, texts: Path, tmp_path: Path) -> None:
    save_sae(lossless(metadata={"declared_l0": 30.0}), tmp_path / "good", torch.float32)
    result = sae("verify", tmp_path / "good", "--texts", texts, "--model", model, "--tokens", "1024")
    assert result.exit_code == 0, result.output
    assert "32.00" in result.output  # every coordinate is one active feature
    assert "0.0000" in result.output  # and nothing is lost


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_dec": 3 * lossless().W_dec}, ": the mean activation alone would leave 1"),
        ({"threshold": torch.full((2 * WIDTH,), 1e6)}, "L0 is 0: hardly any feature fires"),
        ({"b_enc": torch.full((2 * WIDTH,), 1e3)}, "L0 is 64: more features fire than the activation has dimensions"),
        ({"metadata": {"declared_l0": 5.0}}, "L0 is 32, declared 5: more than a factor of 2 apart"),
        ({"metadata": {"model_fingerprint": "f" * 64}}, "model_fingerprint"),
        ({"site": Site(7, Stream.RESID_POST)}, "a layer below 3"),
    ],
)
def test_verify_refuses(model: Path, texts: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_sae(lossless(**changes), tmp_path / "bad", torch.float32)
    result = sae("verify", tmp_path / "bad", "--texts", texts, "--model", model, "--tokens", "1024")
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_verify_measures_what_cannot_be_served(model: Path, texts: Path, tmp_path: Path) -> None:
    save_sae(lossless(k=WIDTH, normalisation=Normalisation.LAYER_NORM), tmp_path / "topk", torch.float32)
    result = sae("verify", tmp_path / "topk", "--texts", texts, "--model", model, "--tokens", "1024")
    assert result.exit_code == 0, result.output


def test_declared_figures_are_the_evaluation_s_or_the_format_s(tmp_path: Path) -> None:
    plain = lossless(metadata={"declared_l0": 5.0})
    assert Declared.of(plain, tmp_path) == Declared(5.0, None)
    assert Declared.of(replace(plain, k=3), tmp_path) == Declared(3, None)
    (tmp_path / "evaluation.json").write_text(json.dumps({"evaluation": {"l0": 40.5, "fvu": 0.2}}))
    assert Declared.of(plain, tmp_path) == Declared(40.5, 0.2)
    assert implausible(plain, 30.0, 0.39, Declared(40.5, 0.2)) == []
    assert implausible(plain, 30.0, 0.41, Declared(40.5, 0.2)) == ["FVU is 0.41, declared 0.2: more than 0.2 above"]
    assert implausible(plain, 30.0, float("nan"), Declared()) != []


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "post_attention_layernorm"), ("gemma2", "pre_feedforward_layernorm")]
)
def test_the_gain_is_what_the_norm_before_the_mlp_multiplies_by(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, family: str, name: str
) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family))
    norm = network.model.layers[1].get_submodule(name)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 2, WIDTH))
    loaded = load_model(str(tiny_model_dir(family)), torch.float32)
    loaded.model.load_state_dict(network.state_dict())
    expected = norm.weight + (1 if family == "gemma2" else 0)
    torch.testing.assert_close(norm_gain(loaded)(1), expected.detach(), rtol=1e-6, atol=1e-6)


def test_a_layer_norm_has_no_gain_to_fold(tiny_model_dir: Callable[[str], Path]) -> None:
    for family in ("gpt2", "gpt_neox"):
        gain = norm_gain(load_model(str(tiny_model_dir(family)), torch.float32))
        with pytest.raises(IncompatibleError, match="expected one with an RMSNorm before the MLP"):
            gain(1)
        with pytest.raises(IncompatibleError, match="expected below 3"):
            gain(3)


@pytest.mark.parametrize("content", ["{", "[]", '{"evaluation": []}', '{"evaluation": {"l0": "many"}}'])
def test_a_damaged_record_beside_an_sae_is_named(tmp_path: Path, content: str) -> None:
    save_sae(lossless(), tmp_path / "sae")
    (tmp_path / "sae" / "evaluation.json").write_text(content)
    result = sae("inspect", tmp_path / "sae")
    assert result.exit_code == 2
    assert "evaluation.json" in result.output


def test_more_active_features_than_there_are_is_refused(tmp_path: Path) -> None:
    save_sae(lossless(k=2 * WIDTH + 1), tmp_path / "sae")
    with pytest.raises(AssetError, match="k is 65, expected 1 to 64, the number of features"):
        load_sae(tmp_path / "sae")
