"""What the evaluation puts in the place of an activation, against the SAE's equations in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steerserve.errors import AssetError
from steerserve.lab.evaluation import splice
from steerserve.lab.evaluation.splice import kernel_computes, reconstruct, substituted
from steerserve.models.hooks import transformed
from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE, Normalisation
from steerserve.types import Site, Stream

IN, OUT = Site(1, Stream.MLP_IN), Site(1, Stream.MLP_OUT)


def rows(count: int = 500) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(0))


def float64(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ and the active features of rows, written out."""
    x = x.double()
    mean, scale = torch.zeros(len(x), 1).double(), torch.ones(len(x), 1).double()
    if sae.normalisation is Normalisation.LAYER_NORM:
        mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    z = (x - mean) / (scale + (1e-5 if sae.normalises else 0))
    pre = (z - sae.b_dec.double() * sae.apply_b_dec_to_input) @ sae.W_enc.double() + sae.b_enc.double()
    active = (pre > sae.threshold) & (x.norm(dim=1, keepdim=True) <= sae.max_norm)
    if sae.k:
        active &= pre >= pre.sort(1, descending=True).values[:, sae.k - 1 : sae.k]
    y = (pre * active) @ sae.W_dec.double() + sae.b_dec.double()
    y = y if sae.transcodes_to else y * scale + mean
    return y + (0 if sae.W_skip is None else x @ sae.W_skip.T.double()), active


@pytest.mark.parametrize("rows_at_once", [7, 500])
@pytest.mark.parametrize("variant", ["plain", "b_dec stays", "topk"])
def test_the_kernel_computes_what_it_can(
    random_sae: SAE, monkeypatch: pytest.MonkeyPatch, variant: str, rows_at_once: int
) -> None:
    changes = {"plain": {}, "b_dec stays": {"apply_b_dec_to_input": False}, "topk": {"k": 5}}[variant]
    sae, x = replace(random_sae, **changes), rows()
    launches = []

    def spy(*args: torch.Tensor, **kwargs: torch.Tensor) -> None:
        launches.append(len(args[0]))
        kernel(*args, **kwargs)

    kernel = splice.sae_splice_
    monkeypatch.setattr(splice, "sae_splice_", spy)
    monkeypatch.setattr(splice, "FEATURES_AT_ONCE", rows_at_once * sae.d_sae)
    x_hat, num_active = reconstruct(sae, x)
    assert sum(launches) == len(x)
    assert max(launches) == rows_at_once
    expected, active = float64(sae, x)
    torch.testing.assert_close(x_hat.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(num_active, active.sum(1))
    assert 0 < num_active.double().mean() < sae.d_sae
    assert torch.equal(x, rows())  # what is read stays


@pytest.mark.parametrize("variant", ["layer norm", "skip", "transcoder"])
def test_the_formula_computes_the_rest(random_sae: SAE, variant: str) -> None:
    skip = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    sae = {
        "layer norm": replace(random_sae, normalisation=Normalisation.LAYER_NORM),
        "skip": replace(random_sae, W_skip=skip),
        "transcoder": replace(random_sae, site=IN, transcodes_to=OUT, apply_b_dec_to_input=False, W_skip=skip),
    }[variant]
    assert not kernel_computes(sae)
    x_hat, num_active = reconstruct(sae, rows())
    expected, active = float64(sae, rows())
    torch.testing.assert_close(x_hat.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(num_active, active.sum(1))


def test_a_row_whose_features_do_not_fit_would_be_left_alone(random_sae: SAE) -> None:
    """All features of a row may be active: none is lost, however many there are."""
    sae = replace(random_sae, threshold=torch.full((48,), -torch.inf))
    x_hat, num_active = reconstruct(sae, rows(3))
    assert num_active.tolist() == [48, 48, 48]
    torch.testing.assert_close(x_hat.double(), float64(sae, rows(3))[0], rtol=1e-5, atol=1e-5)


def test_a_transcoder_reads_one_site_and_writes_the_other(tiny: LoadedModel, random_sae: SAE) -> None:
    sae = replace(random_sae, site=IN, transcodes_to=OUT, apply_b_dec_to_input=False)
    tokens = torch.arange(24).reshape(2, 12)
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, value: torch.Tensor) -> torch.Tensor:
        seen[name] = value
        return value

    def run() -> None:
        tiny.model(tokens, use_cache=False)

    with torch.inference_mode():
        with transformed(tiny, {IN: lambda x: note("x", x), OUT: lambda y: note("y", y)}):
            run()
        splice_ = substituted(sae, lambda x, y: 2 * y + reconstruct(sae, x)[0])
        with transformed(tiny, splice_), transformed(tiny, {OUT: lambda y: note("after", y)}):
            run()
    expected = 2 * seen["y"] + reconstruct(sae, seen["x"].flatten(0, 1))[0].view_as(seen["y"])
    torch.testing.assert_close(seen["after"][:, 1:], expected[:, 1:])
    assert torch.equal(seen["after"][:, 0], seen["y"][:, 0])  # the first position is no place for an SAE


def test_beyond_its_largest_norm_an_sae_puts_nothing(tiny: LoadedModel, random_sae: SAE) -> None:
    tokens = torch.arange(24).reshape(2, 12)
    norms: list[torch.Tensor] = []
    substitute: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        norms.append(x.norm(dim=-1))
        return x

    with torch.inference_mode():
        with transformed(tiny, {random_sae.site: note}):
            tiny.model(tokens)
        bound = norms[0][:, 1:].median().item()
        with transformed(
            tiny, substituted(replace(random_sae, max_norm=bound), lambda x, y: substitute.append(x) or y)
        ):
            tiny.model(tokens)
    assert len(substitute[0]) == (norms[0][:, 1:] <= bound).sum()
    assert 0 < len(substitute[0]) < 22


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_activation_that_is_not_finite_is_named(tiny: LoadedModel, random_sae: SAE, value: float) -> None:
    def break_one(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[1, 5, 3] = value
        return x

    breaking = transformed(tiny, {Site(0, Stream.RESID_POST): break_one})
    splicing = transformed(tiny, substituted(random_sae, lambda x, y: y))
    message = r"blocks\.1\.hook_resid_post is not finite in context 1"
    with torch.inference_mode(), breaking, splicing, pytest.raises(AssetError, match=message):
        tiny.model(torch.arange(24).reshape(2, 12))
