"""SAELens files: what we write comes back bit for bit, what we cannot compute exactly is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerserve.errors import AssetError, IncompatibleError
from steerserve.sae.formats import saelens
from steerserve.sae.formats.saelens import save_max_activation, save_sae
from steerserve.sae.model import SAE, Normalisation
from steerserve.sae.registry import load_sae
from steerserve.types import Site, Stream

TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
D_IN, D_SAE = 5, 9


@pytest.fixture
def sae() -> SAE:
    generator = torch.Generator().manual_seed(0)
    return SAE(
        name="toy",
        site=Site(3, Stream.MLP_OUT),
        W_enc=torch.randn(D_IN, D_SAE, generator=generator),
        b_enc=torch.randn(D_SAE, generator=generator),
        W_dec=torch.randn(D_SAE, D_IN, generator=generator),
        b_dec=torch.randn(D_IN, generator=generator),
        threshold=torch.rand(D_SAE, generator=generator),
        max_norm=12.5,
        max_activation=torch.rand(D_SAE, generator=generator),
        metadata={"model_name": "tiny", "model_fingerprint": "f" * 64},
    )


@pytest.fixture
def directory(sae: SAE, tmp_path: Path) -> Path:
    save_sae(sae, tmp_path / "toy", torch.float32)
    return tmp_path / "toy"


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (directory / "max_activation.safetensors").unlink(missing_ok=True)  # it knows the SAE by hash


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "sae_weights.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    metadata = json.loads((directory / "cfg.json").read_text()).get("metadata", {})
    edit_config(directory, metadata={name: value for name, value in metadata.items() if name != "weights_sha256"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_saved_comes_back(sae: SAE, tmp_path: Path, dtype: torch.dtype) -> None:
    save_sae(sae, tmp_path / "toy", dtype)
    loaded = load_sae(tmp_path / "toy")
    for name in TENSORS:
        saved_as = dtype if name.startswith("W_") else torch.float32
        assert torch.equal(getattr(loaded, name), getattr(sae, name).to(saved_as).float()), name
        assert getattr(loaded, name).dtype == torch.float32
    assert torch.equal(loaded.max_activation, sae.max_activation)
    assert (loaded.name, loaded.site, loaded.max_norm, loaded.apply_b_dec_to_input) == ("toy", sae.site, 12.5, True)
    assert loaded.metadata.items() >= sae.metadata.items()
    assert "weights_sha256" not in loaded.metadata


def test_a_second_round_trip_changes_no_byte(directory: Path, tmp_path: Path) -> None:
    save_sae(load_sae(directory), tmp_path / "again", torch.float32)
    for file in ("cfg.json", "sae_weights.safetensors", "max_activation.safetensors"):
        assert (directory / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_the_hash_follows_what_decides_what_an_sae_computes(directory: Path, tmp_path: Path) -> None:
    """The weights, and with the same weights the equations and sites; not the name, notes or what was measured."""
    before = load_sae(directory)
    save_max_activation(torch.ones(D_SAE), before, directory)
    assert load_sae(directory).sha256 == before.sha256
    edit_config(directory, note="new")
    assert load_sae(directory.rename(tmp_path / "renamed")).sha256 == before.sha256
    directory = tmp_path / "renamed"
    config = (directory / "cfg.json").read_text()
    metadata = json.loads(config)["metadata"]
    hashes = {before.sha256}
    for change in (
        {"metadata": metadata | {"hook_name": "blocks.3.hook_resid_post"}},
        {"metadata": metadata | {"max_norm": 20.0}},
        {"metadata": metadata | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}},
        {"apply_b_dec_to_input": False},
        {"normalize_activations": "layer_norm"},
    ):
        (directory / "cfg.json").write_text(config)
        edit_config(directory, **change)
        hashes.add(load_sae(directory).sha256)
    (directory / "cfg.json").write_text(config)
    edit_tensors(directory, lambda tensors: tensors["b_enc"].add_(1))
    hashes.add(load_sae(directory).sha256)
    assert len(hashes) == 7


def test_the_hash_follows_k_and_the_scale(sae: SAE, tmp_path: Path) -> None:
    zero = torch.zeros(D_SAE)
    save_sae(replace(sae, threshold=zero, k=3, max_activation=None), tmp_path / "topk")
    three = load_sae(tmp_path / "topk").sha256
    edit_config(tmp_path / "topk", k=4)
    assert load_sae(tmp_path / "topk").sha256 != three
    save_sae(replace(sae, max_activation=None), tmp_path / "scaled")
    edit_config(tmp_path / "scaled", normalize_activations="expected_average_only_in")
    assert len({load_sae(tmp_path / "scaled", norm_scaling_factor=scale).sha256 for scale in (1.0, 2.0)}) == 2


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_parts_of_two_saes_are_not_taken_for_one(directory: Path, sae: SAE, file: str) -> None:
    """What a reader finds, or a kill leaves, while an SAE is replaced."""
    old = (directory / file).read_bytes()
    save_sae(replace(sae, b_enc=sae.b_enc + 1, site=Site(2, Stream.MLP_OUT), max_activation=None), directory)
    assert load_sae(directory).max_activation is None, "the largest activations of the one before are gone"
    (directory / file).write_bytes(old)
    with pytest.raises(AssetError, match=r"cfg\.json is of weights with SHA-256 \w+; sae_weights\.safetensors has \w+"):
        load_sae(directory)


def test_an_sae_that_cannot_be_written_leaves_the_old_one(
    directory: Path, sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(saelens, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_sae(replace(sae, b_enc=sae.b_enc + 1), directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_an_sae_without_extras(sae: SAE, tmp_path: Path) -> None:
    plain = replace(sae, max_norm=float("inf"), max_activation=None, apply_b_dec_to_input=False)
    save_sae(plain, tmp_path / "toy")
    loaded = load_sae(tmp_path / "toy")
    assert (loaded.max_norm, loaded.max_activation, loaded.apply_b_dec_to_input) == (float("inf"), None, False)


def test_standard_is_relu(directory: Path) -> None:
    edit_config(directory, architecture="standard")
    edit_tensors(directory, lambda tensors: tensors.pop("threshold"))
    assert torch.equal(load_sae(directory).threshold, torch.zeros(D_SAE))


def test_a_config_of_before_saelens_6(directory: Path) -> None:
    """Flat keys, no architecture, a boolean for normalisation, and a scaling factor that does nothing."""
    old = {"d_in": D_IN, "d_sae": D_SAE, "hook_name": "blocks.8.hook_resid_pre", "normalize_activations": False}
    (directory / "cfg.json").write_text(json.dumps(old | {"activation_fn_str": "relu"}))
    edit_tensors(directory, lambda tensors: tensors.pop("threshold"))
    edit_tensors(directory, lambda tensors: tensors.update(scaling_factor=torch.ones(D_SAE)))
    loaded = load_sae(directory)
    assert loaded.site == Site(8, Stream.RESID_PRE)
    assert torch.equal(loaded.threshold, torch.zeros(D_SAE))


def test_a_negative_threshold_means_zero(directory: Path, sae: SAE) -> None:
    """SAELens takes relu(pre) before it compares, so that no feature is ever negative."""
    edit_tensors(directory, lambda tensors: tensors["threshold"].neg_())
    loaded = load_sae(directory)
    assert torch.equal(loaded.threshold, torch.zeros(D_SAE))
    assert (loaded.encode(torch.randn(50, D_IN, generator=torch.Generator().manual_seed(0))) >= 0).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architecture": "temporal"},
            "architecture 'temporal' is not supported \\(supported: standard, jumprelu, topk",
        ),
        (
            {"architecture": "batchtopk"},
            "architecture 'batchtopk' is not supported.*; save it with save_inference_model",
        ),
        ({"architecture": "topk"}, "k is None, expected a positive integer"),
        ({"architecture": "topk", "k": True}, "k is True, expected a positive integer"),
        ({"architecture": "gated"}, "tensor b_gate is missing"),
        ({"architecture": "transcoder"}, "d_out is None, expected a positive integer"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations='covariance_whitening' is not supp"),
        ({"normalize_activations": True}, "the file lacks their scale; give the norm scaling factor"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' is not supported"),
        ({"hook_head_index": 3}, "the SAE reads head 3 alone"),
        ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu' is not supported"),
        ({"metadata": {}}, "metadata.hook_name is missing"),
        ({"metadata": []}, r"metadata is \[\], expected a JSON object"),
        ({"metadata": {"hook_name": "blocks.3.attn.hook_q"}}, r"hook_name: got 'blocks.3.attn.hook_q', expected"),
        ({"d_sae": D_SAE + 1}, r"W_enc has shape \(5, 9\), expected \(5, 10\)"),
        ({"d_in": None}, "d_in is None, expected a positive integer"),
        ({"metadata": {"hook_name": "blocks.0.hook_mlp_out", "max_norm": float("nan")}}, "max_norm is nan"),
        ({"metadata": {"hook_name": "blocks.0.hook_mlp_out", "max_norm": "big"}}, "max_norm is 'big'"),
    ],
)
def test_configs_that_are_refused(directory: Path, config: dict[str, Any], message: str) -> None:
    edit_config(directory, **config)
    with pytest.raises(AssetError, match=message) as caught:
        load_sae(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "tensor {} is missing"),
        (lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}), "{} has shape"),
        (lambda tensors, name: tensors[name].view(-1)[1:2].fill_(float("nan")), "{} holds NaN or infinity"),
        (lambda tensors, name: tensors[name].view(-1)[1:2].fill_(float("inf")), "{} holds NaN or infinity"),
    ],
    ids=["missing", "shape", "nan", "infinite"],
)
def test_weights_that_are_refused(directory: Path, name: str, edit: Callable[..., object], message: str) -> None:
    edit_tensors(directory, lambda tensors: edit(tensors, name))
    with pytest.raises(AssetError, match=message.format(name)):
        load_sae(directory)


@pytest.mark.parametrize("name", ["W_skip", "scaling_factor"])
def test_a_tensor_that_would_change_the_equations_is_refused(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.full((D_SAE,), 2.0)}))
    with pytest.raises(AssetError, match=f"{name} has no place in a jumprelu SAE"):
        load_sae(directory)


def test_maximum_activations_of_another_sae_are_refused(directory: Path) -> None:
    sae = load_sae(directory)
    save_max_activation(torch.ones(D_SAE), replace(sae, sha256="f" * 64), directory)
    with pytest.raises(AssetError, match=r"measured of an SAE with SHA-256 ffff.*delete"):
        load_sae(directory)
    save_max_activation(torch.ones(D_SAE - 1), sae, directory)
    with pytest.raises(AssetError, match="max_activation has shape"):
        load_sae(directory)


def test_maximum_activations_that_name_no_sae_are_read(directory: Path) -> None:
    """As those of earlier versions."""
    save_file({"max_activation": torch.ones(D_SAE)}, directory / "max_activation.safetensors")
    assert torch.equal(load_sae(directory).max_activation, torch.ones(D_SAE))


def test_files_that_are_missing_or_damaged(directory: Path, tmp_path: Path) -> None:
    weights = directory / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AssetError, match="cannot be read as safetensors"):
        load_sae(directory)
    (directory / "cfg.json").write_text("{")
    with pytest.raises(AssetError, match="not valid JSON"):
        load_sae(directory)
    (directory / "cfg.json").write_text("[]")
    with pytest.raises(AssetError, match="expected a JSON object"):
        load_sae(directory)
    (directory / "cfg.json").unlink()
    with pytest.raises(AssetError, match=r"cfg\.json cannot be read"):
        load_sae(directory)
    weights.unlink()
    with pytest.raises(AssetError, match="holds no SAE of a known format"):
        load_sae(directory)


def test_the_sparsity_file_declares_l0(directory: Path) -> None:
    """SAELens keeps log10 of each feature's density there."""
    density = torch.tensor([0.5, 0.25, *[1e-10] * (D_SAE - 2)])
    save_file({"sparsity": density.log10()}, directory / "sparsity.safetensors")
    assert load_sae(directory).metadata["declared_l0"] == 0.75


def test_where_transformerlens_took_the_mean_off_so_does_the_encoder(directory: Path, sae: SAE) -> None:
    plain = load_sae(directory)
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    edit_config(directory, metadata={"hook_name": "blocks.3.hook_mlp_out"} | kwargs)
    centred = load_sae(directory)
    x = torch.randn(60, D_IN, generator=torch.Generator().manual_seed(2)) + 1
    expected = plain.encode(x - x.mean(1, keepdim=True))
    assert not torch.allclose(plain.encode(x), expected, atol=0.1)
    torch.testing.assert_close(centred.encode(x), expected, rtol=1e-5, atol=1e-5)
    save_sae(centred, directory / "again", torch.float32)
    again = load_sae(directory / "again")
    assert again.metadata["model_from_pretrained_kwargs"] == {}
    torch.testing.assert_close(again.encode(x), expected, rtol=1e-5, atol=1e-5)


def test_the_gain_of_a_norm_is_folded_on_both_sides_of_an_autoencoder(directory: Path) -> None:
    plain, gain = load_sae(directory), torch.tensor([0.5, 1.5, -2.0, 3.0, 0.25])
    edit_config(directory, metadata={"hook_name": "blocks.3.ln2.hook_normalized"})
    folded = load_sae(directory, norm_gain=lambda layer: gain)
    assert (folded.site, folded.out_site) == (Site(3, Stream.MLP_IN), Site(3, Stream.MLP_IN))
    z = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(folded.encode(z * gain), plain.encode(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.reconstruct(z * gain), plain.reconstruct(z) * gain, rtol=1e-5, atol=1e-5)
    edit_config(directory, normalize_activations="layer_norm")
    with pytest.raises(AssetError, match="normalize_activations='layer_norm' is not supported at this site"):
        load_sae(directory, norm_gain=lambda layer: gain)


def test_a_hook_that_saelens_misnames_is_read_by_its_true_name_or_not_at_all(directory: Path) -> None:
    """Its ``hook_mlp_in`` for Gemma Scope 2 lies before the norm; the SAE was trained behind it."""
    true_name = {"hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output"}
    edit_config(directory, metadata={"hook_name": "blocks.3.hook_mlp_in"} | true_name)
    assert load_sae(directory).site == Site(3, Stream.MLP_IN)
    edit_config(directory, metadata={"hook_name": "blocks.3.hook_mlp_in"})
    with pytest.raises(AssetError, match=r"got 'blocks\.3\.hook_mlp_in'"):
        load_sae(directory)
    assert load_sae(directory, site=Site(3, Stream.MLP_IN)).site == Site(3, Stream.MLP_IN)


WRITTEN: dict[str, dict[str, Any]] = {
    "standard": {"threshold": torch.zeros(D_SAE)},
    "jumprelu": {},
    "topk": {"threshold": torch.zeros(D_SAE), "k": 3, "normalisation": Normalisation.LAYER_NORM},
    "transcoder": {"threshold": torch.zeros(D_SAE), "transcodes_to": Site(3, Stream.RESID_POST)},
    "skip_transcoder": {"threshold": torch.zeros(D_SAE), "W_skip": torch.randn(D_IN, D_IN)},
    "jumprelu_transcoder": {"transcodes_to": Site(3, Stream.RESID_POST)},
    "jumprelu_skip_transcoder": {"transcodes_to": Site(3, Stream.RESID_POST), "W_skip": torch.randn(D_IN, D_IN)},
}
"""By SAELens' name of what is written; the skip transcoder is an autoencoder with a skip connection."""


@pytest.mark.parametrize("architecture", WRITTEN)
@pytest.mark.filterwarnings("ignore")
def test_saelens_reads_our_files_alike(sae: SAE, tmp_path: Path, architecture: str) -> None:
    """And we read what SAELens writes. Runs where sae-lens is installed; it is not among our dependencies."""
    sae_lens = pytest.importorskip("sae_lens")
    changes = WRITTEN[architecture]
    ours = replace(sae, max_norm=float("inf"), apply_b_dec_to_input="transcodes_to" not in changes, **changes)
    save_sae(ours, tmp_path / "ours", torch.float32)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert theirs.cfg.architecture() == architecture
    x = 2 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(1))
    f = ours.encode(x)
    assert 0 < (f > 0).float().mean() < 1
    torch.testing.assert_close(theirs.encode(x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), ours.reconstruct(x), rtol=1e-5, atol=1e-5)
    assert theirs.cfg.metadata.hook_name == str(ours.site)
    theirs.save_model(tmp_path / "theirs")
    back = load_sae(tmp_path / "theirs")
    assert (back.site, back.out_site, back.k, back.W_skip is None) == (
        ours.site, ours.out_site, ours.k, ours.W_skip is None,
    )  # fmt: skip
    torch.testing.assert_close(back.encode(x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.reconstruct(x), ours.reconstruct(x), rtol=1e-5, atol=1e-5)


def test_what_saelens_cannot_express_is_not_written(sae: SAE, tmp_path: Path) -> None:
    for changes, kind in [
        ({"k": 2, "W_skip": torch.ones(D_IN, D_IN)}, "TopK transcoder"),
        (
            {"normalisation": Normalisation.LAYER_NORM, "W_skip": torch.ones(D_IN, D_IN)},
            "autoencoder with both normalisation and skip connection",
        ),
    ]:
        with pytest.raises(IncompatibleError, match=f"SAELens, which has no {kind}"):
            save_sae(replace(sae, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
