"""Formats whose libraries are not to be had: files with the documented tensors, against formulas in float64.

And what every loader refuses, with its reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steerserve.errors import AssetError, IncompatibleError
from steerserve.sae.model import SAE, Normalisation
from steerserve.sae.registry import load_sae
from steerserve.types import Site, Stream

D_IN, D_OUT, D_SAE, K = 6, 5, 20, 4
Arrays = dict[str, np.ndarray]


def rows(seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 2.0, (48, D_IN)).astype(np.float32)


def random_arrays(d_out: int = D_IN) -> Arrays:
    """The five tensors, float32, thresholds among the pre-activations."""
    rng = np.random.default_rng(4)
    arrays = {
        "W_enc": rng.normal(size=(D_IN, D_SAE)),
        "b_enc": 0.3 * rng.normal(size=D_SAE),
        "W_dec": rng.normal(size=(D_SAE, d_out)),
        "b_dec": 0.3 * rng.normal(size=d_out),
        "threshold": 2 * rng.random(D_SAE),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def double(arrays: Arrays) -> Arrays:
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def jumprelu(pre: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    return np.where(pre > threshold, np.maximum(pre, 0), 0)


def topk(pre: np.ndarray) -> np.ndarray:
    kth = np.sort(pre, axis=1)[:, -K, None]
    return np.where(pre >= kth, np.maximum(pre, 0), 0)


def check(sae: SAE, f: np.ndarray, out: np.ndarray) -> None:
    """The SAE computes ``f`` and ``out``, from features of which some are on and some off."""
    assert 0.02 < (f > 0).mean() < 0.9
    x = torch.from_numpy(rows())
    np.testing.assert_array_equal((sae.encode(x) > 0).numpy(), f > 0)
    np.testing.assert_allclose(sae.encode(x).numpy(), f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(x).numpy(), out, rtol=1e-5, atol=1e-5)


def write_gemma_scope(directory: Path, arrays: Arrays) -> Path:
    directory.mkdir(parents=True)
    np.savez_compressed(directory / "params.npz", **arrays)
    return directory


def test_gemma_scope(tmp_path: Path) -> None:
    arrays = random_arrays()
    sae = load_sae(write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", arrays))
    assert (str(sae.site), sae.metadata) == (
        "blocks.12.hook_resid_post",
        {"model_name": "google/gemma-2-2b", "declared_l0": 82.0},
    )
    exact, x = double(arrays), rows().astype(np.float64)
    f = jumprelu(x @ exact["W_enc"] + exact["b_enc"], exact["threshold"])  # b_dec is not subtracted
    check(sae, f, f @ exact["W_dec"] + exact["b_dec"])


@pytest.mark.parametrize(
    ("origin", "site"),
    [
        ("models--google--gemma-scope-9b-it-res/snapshots/abc/layer_9/width_16k/canonical", "blocks.9.hook_resid_post"),
        ("gemma-scope-2b-pt-mlp/layer_3/width_65k/average_l0_5", "blocks.3.hook_mlp_out"),
    ],
)
def test_the_site_of_gemma_scope_is_in_the_path(tmp_path: Path, origin: str, site: str) -> None:
    assert str(load_sae(write_gemma_scope(tmp_path / origin, random_arrays())).site) == site


def test_gemma_scope_transcoders_read_before_the_norm_s_gain(tmp_path: Path) -> None:
    """With x = z · gain at ``mlp.hook_in``, the SAE of x computes what the file's computes from z."""
    arrays = random_arrays(D_OUT)
    directory = write_gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_76", arrays)
    with pytest.raises(AssetError, match=r"blocks\.7\.ln2\.hook_normalized, the norm's output before its gain; give"):
        load_sae(directory)
    gain = torch.tensor([0.5, 1.5, -2.0, 3.0, 0.25, 1.0])
    asked: list[int] = []
    sae = load_sae(directory, norm_gain=lambda layer: asked.append(layer) or gain)
    assert asked == [7]
    assert (str(sae.site), str(sae.out_site)) == ("blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out")
    exact, z = double(arrays), rows().astype(np.float64) / gain.double().numpy()
    f = jumprelu(z @ exact["W_enc"] + exact["b_enc"], exact["threshold"])
    check(sae, f, f @ exact["W_dec"] + exact["b_dec"])
    with pytest.raises(AssetError, match="is zero or not finite in places"):
        load_sae(directory, norm_gain=lambda layer: gain * 0)
    with pytest.raises(IncompatibleError, match=r"norm_gain\.shape: got \(7,\), expected \(6,\)"):
        load_sae(directory, norm_gain=lambda layer: torch.ones(7))


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("somewhere/layer_12", "does not say which site"),
        ("gemma-scope-2b-pt-res/embedding/width_4k", "reads the embedding"),
    ],
)
def test_gemma_scope_without_a_site_of_ours(tmp_path: Path, origin: str, message: str) -> None:
    directory = write_gemma_scope(tmp_path / origin, random_arrays())
    with pytest.raises(AssetError, match=message):
        load_sae(directory)


def test_a_site_may_be_given_where_nothing_says_one(tmp_path: Path) -> None:
    directory = write_gemma_scope(tmp_path / "mine", random_arrays())
    site = Site(4, Stream.MLP_OUT)
    assert load_sae(directory, site=site).site == site
    with pytest.raises(AssetError, match="before its gain"):  # what every Gemma Scope transcoder reads
        load_sae(directory, site=Site(4, Stream.MLP_IN))


def write_gemma_scope_2(directory: Path, config: dict[str, Any], arrays: Arrays) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"architecture": "jump_relu", "l0": 20} | config))
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    tensors = {names.get(name, name): torch.from_numpy(array.copy()) for name, array in arrays.items()}
    save_file(tensors, directory / "params.safetensors")
    return directory


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("model.layers.10.output", "blocks.10.hook_resid_post"),
        ("model.layers.10.post_feedforward_layernorm.output", "blocks.10.hook_mlp_out"),
    ],
)
def test_gemma_scope_2(tmp_path: Path, module: str, site: str) -> None:
    arrays = random_arrays()
    config = {"hf_hook_point_in": module, "hf_hook_point_out": module, "model_name": "gemma-v3-270m-pt", "type": "sae"}
    sae = load_sae(write_gemma_scope_2(tmp_path / "layer_10_width_16k_l0_small", config, arrays))
    assert (str(sae.site), sae.out_site, sae.why_not_steerable()) == (site, sae.site, None)
    assert sae.metadata == {"model_name": "gemma-v3-270m-pt", "type": "sae", "declared_l0": 20.0}
    exact, x = double(arrays), rows().astype(np.float64)
    f = jumprelu(x @ exact["W_enc"] + exact["b_enc"], exact["threshold"])
    check(sae, f, f @ exact["W_dec"] + exact["b_dec"])


def test_a_gemma_scope_2_transcoder_with_its_skip_connection(tmp_path: Path) -> None:
    skip = np.random.default_rng(5).normal(size=(D_IN, D_OUT)).astype(np.float32)  # stored as [d_in, d_out]
    arrays = random_arrays(D_OUT) | {"affine_skip_connection": skip}
    config = {
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
    }
    sae = load_sae(write_gemma_scope_2(tmp_path / "layer_5_width_16k_l0_big_affine", config, arrays))
    assert (str(sae.site), str(sae.out_site)) == ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")
    exact, x = double(arrays), rows().astype(np.float64)
    f = jumprelu(x @ exact["W_enc"] + exact["b_enc"], exact["threshold"])
    check(sae, f, f @ exact["W_dec"] + exact["b_dec"] + x @ exact["affine_skip_connection"])


@pytest.mark.parametrize(
    ("config", "edit", "message"),
    [
        ({"architecture": "topk"}, {}, "architecture is 'topk', expected 'jump_relu'"),
        ({"hf_hook_point_in": "model.layers.3.self_attn.o_proj.input"}, {}, "hf_hook_point_in: got"),
        ({}, {"w_dec": torch.zeros(D_SAE, 4, D_IN)}, "cross-layer transcoder"),
    ],
)
def test_gemma_scope_2_that_is_refused(
    tmp_path: Path, config: dict[str, Any], edit: dict[str, torch.Tensor], message: str
) -> None:
    arrays = random_arrays() | {{"w_dec": "W_dec"}[name]: tensor.numpy() for name, tensor in edit.items()}
    directory = write_gemma_scope_2(tmp_path / "sae", {"hf_hook_point_in": "model.layers.3.output"} | config, arrays)
    with pytest.raises(AssetError, match=message):
        load_sae(directory)


LLAMA_SCOPE = {
    "act_fn": "jumprelu", "jump_relu_threshold": 0.4, "norm_activation": "dataset-wise", "use_glu_encoder": False,
    "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": False, "d_model": D_IN, "d_sae": D_SAE,
    "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
    "dataset_average_activation_norm": {"in": 1.7, "out": 1.7},
}  # fmt: skip


def write_llama_scope(directory: Path, config: dict[str, Any], arrays: Arrays) -> Path:
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "hyperparams.json").write_text(json.dumps(LLAMA_SCOPE | config))
    tensors = {
        "encoder.weight": arrays["W_enc"].T,
        "encoder.bias": arrays["b_enc"],
        "decoder.weight": arrays["W_dec"].T,
        "decoder.bias": arrays["b_dec"],
    }
    tensors = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    save_file(tensors, directory / "checkpoints" / "final.safetensors")
    return directory


@pytest.mark.parametrize("includes_norm", [False, True])
def test_llama_scope(tmp_path: Path, includes_norm: bool) -> None:
    """The SAE is one of x · s, and the threshold in units of x is θ · s there."""
    arrays = random_arrays()
    sae = load_sae(write_llama_scope(tmp_path / "L15R", {"sparsity_include_decoder_norm": includes_norm}, arrays))
    scale = math.sqrt(D_IN) / 1.7
    assert str(sae.site) == "blocks.15.hook_resid_post"
    exact, x = double(arrays), rows().astype(np.float64)
    pre = (x * scale) @ exact["W_enc"] + exact["b_enc"]
    score = pre * np.linalg.norm(exact["W_dec"], axis=1) if includes_norm else pre
    f = np.where(score > 0.4 * scale, pre, 0)
    check(sae, f, (f @ exact["W_dec"] + exact["b_dec"]) / scale)


def test_a_llama_scope_transcoder_has_a_scale_on_each_side(tmp_path: Path) -> None:
    arrays = random_arrays()
    norms = {"dataset_average_activation_norm": {"in": 1.7, "out": 0.3}, "hook_point_out": "blocks.15.hook_mlp_out"}
    sae = load_sae(write_llama_scope(tmp_path / "L15TC", {"hook_point_in": "blocks.15.mlp.hook_in"} | norms, arrays))
    exact, x = double(arrays), rows().astype(np.float64)
    scale, out_scale = math.sqrt(D_IN) / 1.7, math.sqrt(D_IN) / 0.3
    f = jumprelu((x * scale) @ exact["W_enc"] + exact["b_enc"], 0.4 * scale)
    check(sae, f, (f @ exact["W_dec"] + exact["b_dec"]) / out_scale)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset_average_activation_norm": None}, r"dataset_average_activation_norm\.in is missing"),
        ({"dataset_average_activation_norm": {"in": 1.0}}, r"dataset_average_activation_norm\.out is missing"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "in is 0, expected a positive number"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold is None, expected a positive number"),
        ({"act_fn": "topk"}, r"act_fn='topk' is not supported \(supported: 'jumprelu'\)"),
        ({"norm_activation": "token-wise"}, "norm_activation='token-wise' is not supported"),
        ({"use_glu_encoder": True}, "use_glu_encoder=True is not supported"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder=True is not supported"),
        ({"hook_point_in": "blocks.15.hook_resid_mid"}, "hook_point_in: got 'blocks.15.hook_resid_mid'"),
        ({"d_sae": D_SAE + 1}, r"encoder\.weight has shape \(20, 6\), expected \(21, 6\)"),
    ],
)
def test_llama_scope_that_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    directory = write_llama_scope(tmp_path / "sae", config, random_arrays())
    with pytest.raises(AssetError, match=message):
        load_sae(directory)


def write_openai(file: Path, arrays: Arrays, **entries: Any) -> Path:
    file.parent.mkdir(parents=True)
    tensors = {
        "encoder.weight": arrays["W_enc"].T,
        "latent_bias": arrays["b_enc"],
        "pre_bias": arrays["b_dec"],
        "decoder.weight": arrays["W_dec"].T,
        "latents_activation_frequency": np.ones(D_SAE, np.float32),
    }
    torch.save({name: torch.from_numpy(array.copy()) for name, array in tensors.items()} | entries, file)
    return file


def test_openai_topk_is_layer_normalised(tmp_path: Path) -> None:
    arrays = random_arrays()
    entries = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    file = write_openai(tmp_path / "resid_post_mlp_v5_32k/autoencoders/8.pt", arrays, **entries)
    sae = load_sae(file)
    assert (sae.name, str(sae.site), sae.k) == ("8", "blocks.8.hook_resid_post", K)
    assert sae.normalisation is Normalisation.LAYER_NORM
    exact, x = double(arrays), rows().astype(np.float64)
    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    f = topk(((x - mean) / (std + 1e-5) - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"])
    check(sae, f, (f @ exact["W_dec"] + exact["b_dec"]) * std + mean)


def test_openai_relu_is_not(tmp_path: Path) -> None:
    arrays = random_arrays()
    file = write_openai(tmp_path / "resid_delta_mlp/autoencoders/0.pt", arrays, activation="ReLU")
    assert load_sae(file.parent).sha256 == load_sae(file).sha256  # the only .pt of a directory will do
    sae = load_sae(file)
    assert (str(sae.site), sae.normalises) == ("blocks.0.hook_mlp_out", False)
    exact, x = double(arrays), rows().astype(np.float64)
    f = jumprelu((x - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"], 0)
    check(sae, f, f @ exact["W_dec"] + exact["b_dec"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"activation": "Softplus"}, "activation 'Softplus' is not supported"),
        (
            {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "Identity"}},
            "activation 'TopK, Identity' is not supported",
        ),
        ({"activation": "TopK", "activation_state_dict": {}}, "k is None, expected a positive integer"),
        ({"temperature": 2}, "temperature: expected tensors alone"),
        ({"gate": torch.ones(3)}, "gate has no place in an SAE of OpenAI's"),
        ({"latent_bias": torch.ones(3)}, r"latent_bias has shape \(3,\), expected \(20,\)"),
        ({"encoder.weight": torch.ones(3)}, r"encoder\.weight has shape \(3,\), expected a matrix"),
    ],
)
def test_openai_files_that_are_refused(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    file = write_openai(tmp_path / "resid_delta_attn/autoencoders/0.pt", random_arrays(), **entries)
    with pytest.raises(AssetError, match=message):
        load_sae(file)


class _RunsCode:
    ran = False

    def __reduce__(self) -> tuple[Callable[..., None], tuple[()]]:
        return _run, ()


def _run() -> None:
    _RunsCode.ran = True


@pytest.mark.parametrize("name", ["dictionary/ae.pt", "resid_post_mlp/autoencoders/8.pt"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    torch.save({"encoder.weight": torch.ones(2, 2), "payload": _RunsCode()}, file)
    trainer = {"dict_class": "AutoEncoder", "layer": 0, "submodule_name": "resid_post"}
    (file.parent / "config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(AssetError, match=r"is refused: it holds more than tensors, and loading it could run code"):
        load_sae(file)
    assert not _RunsCode.ran


def test_numpy_archives_with_pickles_are_refused(tmp_path: Path) -> None:
    arrays = random_arrays() | {"W_enc": np.array([_RunsCode()], dtype=object)}
    directory = write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res/layer_1", arrays)
    with pytest.raises(AssetError, match="cannot be read as a numpy archive of numbers"):
        load_sae(directory)
    assert not _RunsCode.ran


@pytest.mark.parametrize("name", ["params.npz", "params.safetensors", "ae.pt", "8.pt", "sae.safetensors"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not what it should be")
    trainer = {"dict_class": "AutoEncoder", "layer": 0, "submodule_name": "resid_post"}
    gemma = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.3.output"}
    (tmp_path / "config.json").write_text(json.dumps(gemma | {"trainer": trainer}))
    (tmp_path / "cfg.json").write_text(json.dumps({"k": 2, "d_in": D_IN, "num_latents": D_SAE}))
    site = None if name == "ae.pt" else Site(3, Stream.RESID_POST)
    with pytest.raises(AssetError, match=f"{name} (cannot be read|is refused)"):
        load_sae(tmp_path, site=site)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_weights_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    arrays = random_arrays()
    arrays[name].flat[3] = value
    directory = write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res/layer_1", arrays)
    with pytest.raises(AssetError, match=f"{name} holds NaN or infinity"):
        load_sae(directory)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "IdentityDict"}, "trainer.dict_class is 'IdentityDict', expected one of AutoEncoder, "),
        ({"layer": None}, "does not say which site the SAE reads"),
        ({"submodule_name": "transformer.wte"}, "does not say which site the SAE reads"),
        (None, "trainer.dict_class is None"),
    ],
)
def test_dictionaries_that_are_refused(tmp_path: Path, trainer: dict[str, Any] | None, message: str) -> None:
    config = {"dict_class": "AutoEncoder", "layer": 2, "submodule_name": "resid_post"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer and config | trainer}))
    torch.save({"bias": torch.zeros(2)}, tmp_path / "ae.pt")
    with pytest.raises(AssetError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("embed_tokens", {}, "does not say which site the SAE reads"),
        ("layers.3.attn", {"transcode": True}, "a transcoder of a whole layer or its MLP is supported"),
        ("layers.3", {"signed": True}, "signed TopK"),
        ("layers.3", {"k": 0}, "k is 0, expected a positive integer"),
        ("layers.3", {"skip_connection": True}, "tensor W_skip is missing"),
    ],
)
def test_sparse_coders_that_are_refused(tmp_path: Path, name: str, config: dict[str, Any], message: str) -> None:
    directory = write_sparsify(tmp_path / name, config)
    with pytest.raises(AssetError, match=message):
        load_sae(directory)


def write_sparsify(directory: Path, config: dict[str, Any]) -> Path:
    arrays = random_arrays()
    tensors = {"encoder.weight": arrays["W_enc"].T, "encoder.bias": arrays["b_enc"]}
    tensors |= {"W_dec": arrays["W_dec"], "b_dec": arrays["b_dec"]}
    directory.mkdir(parents=True)
    save_file({name: torch.from_numpy(a.copy()) for name, a in tensors.items()}, directory / "sae.safetensors")
    (directory / "cfg.json").write_text(json.dumps({"k": K, "d_in": D_IN, "num_latents": D_SAE} | config))
    return directory


def test_module_outputs_before_gemma_s_second_norm_are_no_site(tmp_path: Path) -> None:
    directory = write_sparsify(tmp_path / "layers.3.mlp", {})
    assert str(load_sae(directory).site) == "blocks.3.hook_mlp_out"
    (tmp_path / "config.json").write_text(json.dumps({"model": "google/gemma-2-2b"}))
    with pytest.raises(AssetError, match="the output of a module of google/gemma-2-2b before its norm is not a site"):
        load_sae(directory)


def test_what_holds_no_sae(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"holds no SAE of a known format; expected one of sae_weights\.safetensors"):
        load_sae(tmp_path)
    with pytest.raises(AssetError, match="missing does not exist"):
        load_sae(tmp_path / "missing")
