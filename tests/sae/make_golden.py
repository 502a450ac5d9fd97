"""Make ``golden/``: small SAEs made, saved and run by the libraries whose formats we read.

    pip install --no-deps sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3
    pip install transformer-lens einops wandb simple-parsing natsort schedulefree
    python tests/sae/make_golden.py

``--no-deps`` keeps torch and transformers as they are; nnsight, needed by dictionary-learning to harvest, is stubbed.
Each case is a directory ``golden/LIBRARY/CASE/`` as the library wrote it, and beside it ``CASE.safetensors`` with x,
and with the features f and the output that the library computes from it after loading the directory again.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"
D_IN, D_OUT, D_SAE, K = 8, 6, 24, 4
ROWS = 3 * torch.randn(16, D_IN, generator=torch.Generator().manual_seed(1)) + 0.5
LARGE = 2048
"""Rows of one training batch of dictionary_learning."""


def record(library: str, case: str, f: torch.Tensor, out: torch.Tensor, x: torch.Tensor = ROWS) -> None:
    """Keep what the library computed; features that never fire, or all do, would test nothing."""
    share = (f > 0).float().mean().item()
    assert 0.05 < share < 0.95, f"{library}/{case}: {share:.0%} of the features are active"
    tensors = {"x": x, "f": f, "out": out}
    save_file(
        {name: t.detach().float().contiguous().clone() for name, t in tensors.items()},
        GOLDEN / library / f"{case}.safetensors",
    )


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Parameters of ordinary size, so that no bias is zero and no threshold out of reach."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(2 * noise.abs() if name == "threshold" else 0.5 * noise)


def make_sae_lens() -> None:
    """Every inference architecture, and the two that are saved as jumprelu."""
    import sae_lens
    from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae, transcoder
    from sae_lens.saes.sae import SAEMetadata

    hooks = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}
    across = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out", "model_name": "tiny"}

    def case(name: str, sae_class: Any, config_class: Any, **settings: Any) -> None:
        transcodes = "Transcoder" in sae_class.__name__
        if transcodes:
            settings |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
        metadata = SAEMetadata(**(across if transcodes else hooks))
        sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **settings))
        randomise(sae, seed=len(name))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(1.0)
        save = sae.save_inference_model if hasattr(sae, "save_inference_model") else sae.save_model
        directory = GOLDEN / "sae_lens" / name
        save(directory)
        loaded = sae_lens.SAE.load_from_disk(directory)
        if loaded.cfg.normalize_activations == "expected_average_only_in":
            loaded.fold_activation_norm_scaling_factor(0.25)
        record("sae_lens", name, loaded.encode(ROWS), loaded(ROWS))

    standard = (sae_lens.StandardSAE, sae_lens.StandardSAEConfig)
    jumprelu = (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig)
    topk = (sae_lens.TopKSAE, sae_lens.TopKSAEConfig)
    case("standard", *standard)
    case("standard_no_b_dec", *standard, apply_b_dec_to_input=False)
    case("standard_layer_norm", *standard, normalize_activations="layer_norm")
    case("standard_expected_average", *standard, normalize_activations="expected_average_only_in")
    case("jumprelu", *jumprelu)
    case("jumprelu_constant_norm", *jumprelu, normalize_activations="constant_norm_rescale")
    case("gated", sae_lens.GatedSAE, sae_lens.GatedSAEConfig)
    case("topk", *topk, k=K)
    case("topk_layer_norm", *topk, k=K, normalize_activations="layer_norm")
    case("topk_rescaled", *topk, k=K, rescale_acts_by_decoder_norm=True)
    scaled = {"rescale_acts_by_decoder_norm": True, "normalize_activations": "expected_average_only_in"}
    case("topk_rescaled_expected_average", *topk, k=K, **scaled)
    case("transcoder", transcoder.Transcoder, transcoder.TranscoderConfig)
    case(
        "transcoder_layer_norm", transcoder.Transcoder, transcoder.TranscoderConfig, normalize_activations="layer_norm"
    )
    case("skip_transcoder", transcoder.SkipTranscoder, transcoder.SkipTranscoderConfig)
    case("jumprelu_transcoder", transcoder.JumpReLUTranscoder, transcoder.JumpReLUTranscoderConfig)
    case("jumprelu_skip_transcoder", transcoder.JumpReLUSkipTranscoder, transcoder.JumpReLUSkipTranscoderConfig)
    batch = (batchtopk_sae.BatchTopKTrainingSAE, batchtopk_sae.BatchTopKTrainingSAEConfig)
    case("batchtopk", *batch, k=K)
    matryoshka = (
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE,
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig,
    )
    case("matryoshka", *matryoshka, k=K, matryoshka_widths=[8, D_SAE])
    make_old_sae_lens(sae_lens.SAE)


def make_old_sae_lens(sae_class: Any) -> None:
    """The same weights under a ``cfg.json`` as SAELens wrote it before version 6, read by SAELens' own conversion."""
    old = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small",
        "hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1, "hook_point_head_index": None,
        "prepend_bos": True, "dataset_path": "openwebtext", "context_size": 128,
    }  # fmt: skip
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "old_relu": ("standard", {"activation_fn_str": "relu", "normalize_activations": False}),
        "old_topk": (
            "topk",
            {
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": K},
                "normalize_activations": "layer_norm",
                "apply_b_dec_to_input": False,
            },
        ),
    }
    for name, (weights_of, settings) in cases.items():
        directory = GOLDEN / "sae_lens" / name
        directory.mkdir()
        shutil.copy(GOLDEN / "sae_lens" / weights_of / "sae_weights.safetensors", directory)
        (directory / "cfg.json").write_text(json.dumps(old | settings))
        loaded = sae_class.load_from_disk(directory)
        record("sae_lens", name, loaded.encode(ROWS), loaded(ROWS))


def make_dictionary_learning() -> None:
    """Each class trained for a few steps by ``trainSAE``, which writes ``ae.pt`` and ``config.json``."""
    stub = types.ModuleType("nnsight")
    stub.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules.setdefault("nnsight", stub)
    from dictionary_learning import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k
    from dictionary_learning.training import trainSAE

    generator = torch.Generator().manual_seed(2)
    data = [3 * torch.randn(LARGE, D_IN, generator=generator) + 0.5 for _ in range(60)]

    def case(name: str, trainer: Any, load: Callable[[Path], Any], normalise: bool = False, **settings: Any) -> None:
        config = {
            "trainer": trainer, "steps": 60, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "seed": 0,
            "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3", "device": "cpu", "lr": 0.02,
            "warmup_steps": 5,
        } | settings  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            trainSAE(data, [config], 60, save_dir=scratch, device="cpu", normalize_activations=normalise)
            directory = GOLDEN / "dictionary_learning" / name
            shutil.copytree(Path(scratch) / "trainer_0", directory)
        dictionary = load(directory / "ae.pt")
        record("dictionary_learning", name, dictionary.encode(ROWS), dictionary(ROWS))

    sparse: dict[str, Any] = {"l1_penalty": 0.02, "sparsity_warmup_steps": None}
    case("standard", standard.StandardTrainer, AutoEncoder.from_pretrained, **sparse)
    case("april_update", standard.StandardTrainerAprilUpdate, AutoEncoder.from_pretrained, **sparse)
    new = {"dict_class": AutoEncoderNew} | sparse
    case("auto_encoder_new", standard.StandardTrainerAprilUpdate, AutoEncoderNew.from_pretrained, **new)
    case("gated", gdm.GatedSAETrainer, GatedAutoEncoder.from_pretrained, **sparse)
    case(
        "jumprelu", jumprelu.JumpReluTrainer, JumpReluAutoEncoder.from_pretrained, sparsity_warmup_steps=None,
        bandwidth=0.5, target_l0=float(K),
    )  # fmt: skip
    case("topk", top_k.TopKTrainer, top_k.AutoEncoderTopK.from_pretrained, k=K, threshold_start_step=1)
    batch: dict[str, Any] = {"k": K, "threshold_start_step": 1, "threshold_beta": 0.5}
    case("batch_topk", batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE.from_pretrained, **batch)
    case("batch_topk_unset", batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE.from_pretrained, k=K)
    scaled = {"normalise": True} | batch
    case("batch_topk_normalised", batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE.from_pretrained, **scaled)
    case(
        "matryoshka", matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        matryoshka_batch_top_k.MatryoshkaBatchTopKSAE.from_pretrained, group_fractions=[0.25, 0.75], **batch,
    )  # fmt: skip


def make_sparsify() -> None:
    """SAEs and transcoders; the name of the innermost directory is the module they belong to."""
    from sparsify import SparseCoder, SparseCoderConfig

    def case(name: str, module: str, **settings: Any) -> None:
        coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, **settings))
        randomise(coder, seed=len(name))
        directory = GOLDEN / "sparsify" / name / module
        coder.save_to_disk(directory)
        loaded = SparseCoder.load_from_disk(directory)
        out = loaded(ROWS, ROWS)
        f = torch.zeros(len(ROWS), D_SAE).scatter(1, out.latent_indices, out.latent_acts)
        record("sparsify", name, f, out.sae_out)

    case("topk", "layers.10")
    case("attention", "h.0.attn", normalize_decoder=False)
    case("skip", "layers.3.mlp", skip_connection=True)
    case("transcoder", "layers.4.mlp", transcode=True)
    case("skip_transcoder", "layers.5", transcode=True, skip_connection=True)
    case("groupmax", "layers.6", activation="groupmax")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for library, make in {
        "sae_lens": make_sae_lens,
        "dictionary_learning": make_dictionary_learning,
        "sparsify": make_sparsify,
    }.items():
        shutil.rmtree(GOLDEN / library, ignore_errors=True)
        (GOLDEN / library).mkdir(parents=True)
        make()
