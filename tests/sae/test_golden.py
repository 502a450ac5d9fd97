"""SAEs made and run by the libraries whose formats they are in (see ``make_golden``): we compute what they computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerserve.errors import AssetError, IncompatibleError
from steerserve.sae.formats.saelens import save_sae
from steerserve.sae.model import SAE, Normalisation
from steerserve.sae.registry import format_of, load_sae
from steerserve.types import Site, Stream

GOLDEN = Path(__file__).parent / "golden"
SCALE = 0.25
"""The norm scaling factor of the SAELens cases that need one."""

REFUSED = {
    "dictionary_learning/batch_topk_unset": r"threshold of this BatchTopK SAE was never set \(-1\)",
    "sparsify/groupmax": r"activation 'groupmax' is not supported \(supported: 'topk'\)",
}
NOT_IN_SAELENS = ("sparsify/skip", "sparsify/transcoder", "sparsify/skip_transcoder")
ALL = sorted(str(path.relative_to(GOLDEN).with_suffix("")) for path in GOLDEN.glob("*/*.safetensors"))
READ = [case for case in ALL if case not in REFUSED]


def directory_of(case: str) -> Path:
    """The case's directory, or the one in it which is named after a module."""
    directory = GOLDEN / case
    (inner,) = [path for path in directory.iterdir() if path.is_dir()] or [directory]
    return inner


def load(case: str) -> SAE:
    return load_sae(directory_of(case), norm_scaling_factor=SCALE if "expected_average" in case else None)


def assert_same_features(f: torch.Tensor, expected: torch.Tensor, sae: SAE, case: str) -> None:
    """Equal to 1e-5, and the same ones active unless a pre-activation is within 1e-5 of its threshold."""
    differs = (f > 0) != (expected > 0)
    value = torch.maximum(f, expected)
    assert ((value - sae.threshold).abs() < 1e-5)[differs].all(), case
    torch.testing.assert_close(f[~differs], expected[~differs], rtol=1e-5, atol=1e-5)


def test_every_case_is_tried() -> None:
    libraries = [case.partition("/")[0] for case in READ]
    assert {name: libraries.count(name) for name in set(libraries)} == {
        "sae_lens": 20,
        "dictionary_learning": 9,
        "sparsify": 5,
    }


@pytest.mark.parametrize("case", READ)
def test_values_are_the_library_s_own(case: str) -> None:
    sae, golden = load(case), load_file(GOLDEN / f"{case}.safetensors")
    assert_same_features(sae.encode(golden["x"]), golden["f"], sae, case)
    torch.testing.assert_close(sae.reconstruct(golden["x"]), golden["out"], rtol=1e-5, atol=1e-5)
    shaped = golden["x"].view(2, -1, sae.d_in)
    torch.testing.assert_close(sae.reconstruct(shaped).flatten(0, 1), sae.reconstruct(golden["x"]))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_sae_is_refused(case: str) -> None:
    with pytest.raises(AssetError, match=REFUSED[case]):
        load(case)


@pytest.mark.parametrize("case", [case for case in READ if case not in NOT_IN_SAELENS])
def test_what_is_written_in_saelens_format_computes_the_same(case: str, tmp_path: Path) -> None:
    sae, golden = load(case), load_file(GOLDEN / f"{case}.safetensors")
    save_sae(sae, tmp_path / "out", torch.float32)
    again = load_sae(tmp_path / "out")
    assert (again.site, again.out_site, again.k, again.normalisation) == (
        sae.site, sae.out_site, sae.k, sae.normalisation,
    )  # fmt: skip
    assert_same_features(again.encode(golden["x"]), golden["f"], sae, case)
    torch.testing.assert_close(again.reconstruct(golden["x"]), golden["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", NOT_IN_SAELENS)
def test_what_saelens_has_no_architecture_for_is_not_written(case: str, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="an architecture of SAELens, which has no TopK transcoder"):
        save_sae(load(case), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "site", "out_site"),
    [
        ("sae_lens/jumprelu", "blocks.1.hook_resid_post", None),
        ("sae_lens/old_relu", "blocks.1.hook_resid_pre", None),
        ("sae_lens/skip_transcoder", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"),
        ("dictionary_learning/topk", "blocks.3.hook_resid_post", None),
        ("sparsify/topk", "blocks.10.hook_resid_post", None),
        ("sparsify/attention", "blocks.0.hook_attn_out", None),
        ("sparsify/skip", "blocks.3.hook_mlp_out", None),
        ("sparsify/transcoder", "blocks.4.mlp.hook_in", "blocks.4.hook_mlp_out"),
        ("sparsify/skip_transcoder", "blocks.5.hook_resid_pre", "blocks.5.hook_resid_post"),
    ],
)
def test_sites_are_the_ones_that_files_and_names_say(case: str, site: str, out_site: str | None) -> None:
    sae = load(case)
    assert (str(sae.site), str(sae.out_site)) == (site, out_site or site)


def test_what_each_case_is() -> None:
    """k, normalisation and the reason against serving follow from the file."""
    assert load("sae_lens/topk").k == load("dictionary_learning/topk").k == 4
    assert load("sae_lens/old_topk").normalisation is Normalisation.LAYER_NORM
    assert load("sae_lens/jumprelu_constant_norm").normalisation is Normalisation.CONSTANT_NORM_RESCALE
    assert load("dictionary_learning/batch_topk").k is None
    steerable = {case for case in READ if load(case).why_not_steerable() is None}
    assert steerable == {
        *(f"sae_lens/{name}" for name in ("standard", "standard_no_b_dec", "standard_expected_average", "jumprelu")),
        *(f"sae_lens/{name}" for name in ("gated", "batchtopk", "matryoshka", "old_relu")),
        *(case for case in READ if case.startswith("dictionary_learning/") and not case.endswith("/topk")),
    }


def test_decoders_of_dictionary_learning_have_unit_norm_where_its_own_loader_makes_them() -> None:
    raw = torch.load(directory_of("dictionary_learning/april_update") / "ae.pt", weights_only=True)
    assert (raw["decoder.weight"].norm(dim=0) - 1).abs().max() > 0.01
    norms = load("dictionary_learning/april_update").W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_format_is_found_from_a_directory_or_its_weight_file() -> None:
    for case, name, weights in [
        ("sae_lens/gated", "SAELens", "sae_weights.safetensors"),
        ("dictionary_learning/gated", "dictionary_learning", "ae.pt"),
        ("sparsify/topk", "sparsify", "sae.safetensors"),
    ]:
        directory = directory_of(case)
        assert format_of(directory) == format_of(directory / weights) == (name, directory)


def test_a_site_that_contradicts_the_file_is_refused() -> None:
    with pytest.raises(AssetError, match=r"hook_resid_post; blocks\.2\.hook_resid_post was asked for"):
        load_sae(directory_of("sae_lens/jumprelu"), site=Site(2, Stream.RESID_POST))
