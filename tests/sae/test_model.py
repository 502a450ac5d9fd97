"""The SAE's equations, against float64 written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerserve.sae.model import SAE
from steerserve.types import Site, Stream

D_IN, D_SAE = 7, 19


def random_sae(apply_b_dec_to_input: bool = True, max_norm: float = math.inf) -> SAE:
    """Thresholds around the size of the pre-activations, so that each feature is on for some rows."""
    generator = torch.Generator().manual_seed(3)
    return SAE(
        name="random",
        site=Site(2, Stream.RESID_POST),
        W_enc=torch.randn(D_IN, D_SAE, generator=generator),
        b_enc=0.3 * torch.randn(D_SAE, generator=generator),
        W_dec=torch.randn(D_SAE, D_IN, generator=generator),
        b_dec=0.3 * torch.randn(D_IN, generator=generator),
        threshold=torch.rand(D_SAE, generator=generator),
        apply_b_dec_to_input=apply_b_dec_to_input,
        max_norm=max_norm,
    )


def rows(count: int = 64) -> torch.Tensor:
    return torch.randn(count, D_IN, generator=torch.Generator().manual_seed(4))


def encode_by_hand(sae: SAE, x: torch.Tensor) -> np.ndarray:
    """Loops over rows and features in float64."""
    W_enc, b_enc, b_dec = (t.double().numpy() for t in (sae.W_enc, sae.b_enc, sae.b_dec))
    f = np.zeros((len(x), sae.d_sae))
    for n, row in enumerate(x.double().numpy()):
        for j in range(sae.d_sae):
            centred = row - b_dec if sae.apply_b_dec_to_input else row
            pre = float(sum(centred * W_enc[:, j])) + b_enc[j]
            if pre > sae.threshold[j].item() and np.linalg.norm(row) <= sae.max_norm:
                f[n, j] = pre
    return f


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("max_norm", [math.inf, 2.5])
def test_encode_and_decode_are_the_written_equations(apply_b_dec_to_input: bool, max_norm: float) -> None:
    sae, x = random_sae(apply_b_dec_to_input, max_norm), rows()
    expected = encode_by_hand(sae, x)
    active = expected > 0
    assert active.any(0).all()  # every feature is tried on
    assert not active.all(0).any()  # and off
    assert (~active.any(1)).any() == (max_norm < math.inf)  # only a bound silences a whole row
    f = sae.encode(x)
    np.testing.assert_array_equal((f > 0).numpy(), active)
    np.testing.assert_allclose(f.numpy(), expected, rtol=1e-5, atol=1e-5)
    reconstruction = expected @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
    np.testing.assert_allclose(sae.decode(f).numpy(), reconstruction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_any_subset_of_features_encodes_as_the_whole_does(apply_b_dec_to_input: bool) -> None:
    sae, x = random_sae(apply_b_dec_to_input, max_norm=2.5), rows()
    subset = [11, 0, 5]
    W_enc, b_enc, threshold, max_norm, W_dec = sae.rows(subset)
    assert W_enc.is_contiguous()
    assert W_dec.is_contiguous()
    pre = x @ W_enc.T + b_enc
    f = torch.where((pre > threshold) & (x.norm(dim=1, keepdim=True) <= max_norm), pre, 0.0)
    torch.testing.assert_close(f, sae.encode(x)[:, subset], rtol=1e-5, atol=1e-5)
    assert torch.equal(W_dec, sae.W_dec[subset])


@pytest.mark.parametrize("transposed", [True, False])
def test_encoder_columns_lie_in_one_piece_however_they_were_given(transposed: bool) -> None:
    given = torch.randn(D_IN, D_SAE, generator=torch.Generator().manual_seed(5))
    sae = replace(random_sae(), W_enc=given.T.contiguous().T if transposed else given)
    assert torch.equal(sae.W_enc, given)
    assert sae.W_enc.T.is_contiguous()
    assert replace(sae, name="other").W_enc.data_ptr() == sae.W_enc.data_ptr()  # no copy where it already is so


def test_a_feature_at_its_threshold_is_off() -> None:
    sae = SAE(
        name="identity",
        site=Site(0, Stream.RESID_POST),
        W_enc=torch.eye(2),
        b_enc=torch.zeros(2),
        W_dec=torch.eye(2),
        b_dec=torch.zeros(2),
        threshold=torch.tensor([1.5, 0.0]),
        max_norm=2.0,
    )
    x = torch.tensor([[1.5, 0.0], [1.75, 0.25], [0.0, 2.0], [0.0, 2.5]])
    assert sae.encode(x).tolist() == [[0, 0], [1.75, 0.25], [0, 2.0], [0, 0]]  # |x| = max_norm is inside


def test_encode_takes_any_leading_shape_and_bfloat16() -> None:
    sae, x = random_sae(), rows(12).bfloat16()
    f = sae.encode(x.view(2, 6, D_IN))
    assert f.dtype == torch.float32
    torch.testing.assert_close(f.view(12, D_SAE), sae.encode(x.float()))
