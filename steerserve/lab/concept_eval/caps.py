"""Caps on the projection of the activation on a direction, as a pack holds them."""

from __future__ import annotations

import numpy as np

from steerserve.lab.concept_eval.treatments import scaled
from steerserve.models.loading import LoadedModel
from steerserve.steering.packs import ConceptPack, DetectorCard, ModelRef, PackCard, PackTensors, PolicyAction
from steerserve.types import FloatArray, Op, Site

MIN_ACTIVATION = 1e-3
"""A cap that was hardly exceeded still has a scale."""


def capped(bias: FloatArray, cap: FloatArray, largest: FloatArray) -> dict[str, FloatArray]:
    """Columns ``[k]`` of a pack by which CLIP holds directions x · W_enc + ``bias`` at ``cap``; inputs are ``[k]``.

    Each is made a feature that is active above its cap and cut to 0. Outside its domain f is 0, which the kernel's
    clip would push down to a cap below 0.

    Args:
        largest: projection that was seen.
    """
    zero = np.zeros_like(cap)
    scale = np.maximum(largest - cap, np.float32(MIN_ACTIVATION))
    return {"b_enc": bias - cap, "threshold": zero, "value": zero, "max_activation": scale}


def cap_pack(
    model: LoadedModel, site: Site, unit: FloatArray, max_norm: float, cap: float, largest: float
) -> ConceptPack:
    """A policy that caps the projection on ``unit`` ``[d]``, on rows no longer than ``max_norm``."""
    vector, one = unit[None].astype(np.float32), np.ones(1, dtype=np.float32)
    tensors = PackTensors(
        site=np.zeros(1, dtype=np.int64),
        W_enc=vector,
        max_norm=max_norm * one,
        W_dec=vector,
        edited=np.ones(1, dtype=bool),
        weight=one,
        feature_ids=np.full(1, -1, dtype=np.int64),
        **capped(0 * one, cap * one, largest * one),
    )
    card = PackCard(
        name="direction",
        version="1",
        description="a cap",
        model=ModelRef(name=model.name, fingerprint=model.fingerprint),
        sites=[str(site)],
        policy=PolicyAction(op=Op.CLIP),
        detector=DetectorCard(kind="probe", site=str(site), threshold=0.0),
    )
    return scaled(ConceptPack(card, tensors, ""), 1.0)
