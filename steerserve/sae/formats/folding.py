"""Parameters that files hold and ``SAE`` does not, made part of the five tensors without changing any value."""

from __future__ import annotations

import torch

from steerserve.errors import IncompatibleError


def fold_gate(
    W_enc: torch.Tensor, b_gate: torch.Tensor, b_mag: torch.Tensor, r_mag: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The JumpReLU SAE that equals a gated one, f = 1[x W_enc + b_gate > 0] · relu(e^r · x W_enc + b_mag).

    With pre = e^r · x W_enc + b_mag, the gate is open where pre > b_mag − e^r · b_gate.
    """
    scale = r_mag.exp()
    return {"W_enc": W_enc * scale, "b_enc": b_mag, "threshold": (b_mag - scale * b_gate).clamp(min=0)}


def fold_decoder_norm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Decoder rows of unit norm, features in units of the output: f is |W_dec| times as large as it was.

    A row of zeros, a feature without effect, becomes one that never fires.
    """
    norm = tensors["W_dec"].norm(dim=1)
    divisor = torch.where(norm > 0, norm, 1.0)
    encoder = {name: tensors[name] * norm for name in ("W_enc", "b_enc", "threshold")}
    return tensors | encoder | {"W_dec": tensors["W_dec"] / divisor[:, None]}


def fold_input_scale(tensors: dict[str, torch.Tensor], scale: float, out_scale: float) -> dict[str, torch.Tensor]:
    """For an SAE of x · ``scale`` whose output is that of ``out_site`` times ``out_scale``; f keeps its values."""
    folded = {"W_enc": tensors["W_enc"] * scale}
    return tensors | folded | {name: tensors[name] / out_scale for name in ("W_dec", "b_dec")}


def fold_gain(tensors: dict[str, torch.Tensor], gain: torch.Tensor, transcodes: bool) -> dict[str, torch.Tensor]:
    """For an SAE of z, the one of z · ``gain``; an autoencoder's output is then z · ``gain`` too.

    Raises:
        IncompatibleError: the gain has another width, that is, belongs to another model.
    """
    if gain.shape != tensors["W_enc"].shape[:1]:
        expected = f"({len(tensors['W_enc'])},), the width of what the SAE reads"
        raise IncompatibleError("norm_gain.shape", tuple(gain.shape), expected)
    folded = {"W_enc": tensors["W_enc"] / gain[:, None]}
    if not transcodes:
        folded |= {name: tensors[name] * gain for name in ("W_dec", "b_dec")}
    if "W_skip" in tensors:
        folded["W_skip"] = tensors["W_skip"] / gain
    return tensors | folded


def fold_centring(tensors: dict[str, torch.Tensor], applies_b_dec: bool) -> dict[str, torch.Tensor]:
    """For an SAE of x − mean(x), the encoder that subtracts the mean itself; b_dec is subtracted as it was."""
    mean = tensors["W_enc"].mean(0)
    b_enc = tensors["b_enc"] - tensors["b_dec"].sum() * mean if applies_b_dec else tensors["b_enc"]
    return tensors | {"W_enc": tensors["W_enc"] - mean, "b_enc": b_enc}


def threshold_of(value: torch.Tensor) -> torch.Tensor:
    """Every reference takes relu(pre) before it compares, so that a negative threshold means 0."""
    return value.clamp(min=0)
