"""The SAE's equations, against float64 written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerserve.errors import IncompatibleError
from steerserve.sae.model import SAE, Normalisation
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


def test_topk_keeps_the_largest_and_never_a_negative_one() -> None:
    sae = replace(random_sae(), k=3, threshold=torch.zeros(D_SAE))
    pre = ((rows() - sae.b_dec) @ sae.W_enc + sae.b_enc).double().numpy()
    expected = np.zeros_like(pre)
    for row, values in zip(expected, pre, strict=True):
        for j in np.argsort(values)[-3:]:
            row[j] = max(values[j], 0)
    np.testing.assert_allclose(sae.encode(rows()).numpy(), expected, rtol=1e-5, atol=1e-5)
    low = replace(sae, b_enc=sae.b_enc - 100)  # every pre-activation is negative, and no feature fires
    assert not low.encode(rows()).any()


@pytest.mark.parametrize("normalisation", [Normalisation.LAYER_NORM, Normalisation.CONSTANT_NORM_RESCALE])
def test_what_normalisation_takes_off_decoding_puts_back(normalisation: Normalisation) -> None:
    """With an SAE that loses nothing, whatever the scale of x; a row of zeros stays one."""
    eye, zeros = torch.eye(D_IN), torch.zeros(2 * D_IN)
    W_dec = torch.cat([eye, -eye])
    sae = SAE(
        "lossless", Site(0, Stream.RESID_POST), W_dec.T, zeros, W_dec, torch.zeros(D_IN), zeros,
        normalisation=normalisation,
    )  # fmt: skip
    x = torch.cat([rows(), 1000 * rows() + 7, torch.zeros(1, D_IN)])
    torch.testing.assert_close(sae.reconstruct(x), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode(1000 * x), sae.encode(x), rtol=1e-3, atol=1e-3)


def test_a_transcoder_has_its_own_width_site_and_skip_connection() -> None:
    generator = torch.Generator().manual_seed(6)
    W_skip, out = torch.randn(4, D_IN, generator=generator), Site(2, Stream.MLP_OUT)
    sae = replace(
        random_sae(apply_b_dec_to_input=False),
        W_dec=torch.randn(D_SAE, 4, generator=generator),
        b_dec=torch.randn(4, generator=generator),
        W_skip=W_skip,
        transcodes_to=out,
        normalisation=Normalisation.LAYER_NORM,
    )
    assert (sae.d_in, sae.d_out, sae.out_site) == (D_IN, 4, out)
    x = rows()
    z = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    pre = z @ sae.W_enc + sae.b_enc
    f = torch.where(pre > sae.threshold, pre, 0.0)
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-5, atol=1e-5)
    expected = f @ sae.W_dec + sae.b_dec + x @ W_skip.T  # not denormalised, and the skip connection reads x itself
    torch.testing.assert_close(sae.reconstruct(x), expected, rtol=1e-5, atol=1e-4)


def test_what_cannot_be_edited_feature_by_feature_says_why() -> None:
    plain = random_sae(apply_b_dec_to_input=False)
    assert plain.why_not_steerable() is None
    for changes, reason in [
        ({"k": 3}, r"is a TopK SAE \(k = 3\)"),
        ({"normalisation": Normalisation.LAYER_NORM}, r"normalises each activation by itself \(layer_norm\)"),
        ({"transcodes_to": Site(2, Stream.MLP_OUT)}, "is a transcoder: it reads blocks.2.hook_resid_post and writes"),
        ({"W_skip": torch.ones(D_IN, D_IN)}, "has a skip connection"),
        ({"site": Site(2, Stream.MLP_IN)}, "reads blocks.2.mlp.hook_in, which can be read and not edited"),
    ]:
        with pytest.raises(IncompatibleError, match=f"sae: got 'random', expected .* random {reason}"):
            replace(plain, **changes).rows([0])
