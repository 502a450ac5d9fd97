"""A pack over two sites of the tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from steerserve.models.loading import LoadedModel
from steerserve.sae.model import SAE
from steerserve.steering.packs import ConceptPack, DetectorCard, ModelRef, PackCard, PackTensors, PolicyAction, SAERef
from steerserve.types import Op, Site, Stream

MakePack = Callable[..., ConceptPack]

SITES = (Site(0, Stream.RESID_POST), Site(1, Stream.RESID_POST))


@pytest.fixture
def saes(random_sae: SAE) -> dict[Site, SAE]:
    """The same features at both sites."""
    return {site: replace(random_sae, site=site, name=f"random-{site.layer}") for site in SITES}


@pytest.fixture
def make_pack(tiny: LoadedModel, saes: dict[Site, SAE]) -> MakePack:
    """Two features at each site, with an op for all; the detector reads the second site."""

    def make(op: Op = Op.CLAMP, max_norm: float = math.inf) -> ConceptPack:
        features = [3, 8, 20, 41]
        parts = [saes[SITES[0]].rows(features[:2]), saes[SITES[1]].rows(features[2:])]
        W_enc, b_enc, threshold, _, W_dec = (np.concatenate([a, b]) for a, b in zip(*parts, strict=True))
        tensors = PackTensors(
            site=np.array([0, 0, 1, 1]),
            W_enc=W_enc,
            b_enc=b_enc,
            threshold=threshold,
            max_norm=np.full(4, max_norm, dtype=np.float32),
            W_dec=W_dec,
            edited=np.ones(4, dtype=bool),
            value=np.array([-2.0, -4.0, 3.0, 0.0], dtype=np.float32),
            weight=np.array([0.0, 0.0, 0.25, 2.0], dtype=np.float32),
            max_activation=np.array([1.0, 2.0, 1.0, 2.0], dtype=np.float32),
            feature_ids=np.array(features),
        )
        names = [str(site) for site in SITES]
        card = PackCard(
            name="mood",
            version="1",
            description="Features for a test.",
            model=ModelRef(name=tiny.name, fingerprint=tiny.fingerprint),
            saes={name: SAERef(name=f"random-{i}", sha256="a" * 64) for i, name in enumerate(names)},
            sites=names,
            policy=PolicyAction(op=op),
            detector=DetectorCard(kind="features", site=names[1], threshold=0.5),
        )
        return ConceptPack(card, tensors, "f" * 64)

    return make
