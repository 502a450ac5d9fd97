"""A model's facts, an SAE and packs to compile against; no model is loaded.

``steering_specs`` lies beside the tests that import it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.pack_files import save_pack
from steerserve.steering.packs import (
    ConceptPack,
    DetectorCard,
    ModelRef,
    PackCard,
    PackTensors,
    PolicyAction,
    SAERef,
)
from steerserve.types import Op, Site

sys.path.insert(0, str(Path(__file__).parent))

D_MODEL, D_SAE = 8, 6
FINGERPRINT, SAE_SHA = "f" * 64, "a" * 64
SITE = Site.parse("blocks.2.hook_resid_post")


@dataclass(frozen=True)
class Facts:
    """What steering knows of a model."""

    name: str = "toy"
    fingerprint: str = FINGERPRINT
    d_model: int = D_MODEL
    n_layers: int = 4
    n_heads: int = 3
    d_head: int = 4

    def head_writes(self, layer: int, head: int) -> np.ndarray:
        """Random, ``[d_head, d_model]``, of every head another."""
        rng = np.random.default_rng(self.n_heads * layer + head)
        return rng.standard_normal((self.d_head, self.d_model)).astype(np.float32)


@pytest.fixture
def facts() -> Facts:
    return Facts()


@pytest.fixture(scope="session")
def sae() -> SAE:
    generator = torch.Generator().manual_seed(0)
    maxima = torch.arange(1.0, D_SAE + 1)
    maxima[5] = 0.0  # a dead feature
    return SAE(
        name="toy-sae",
        site=SITE,
        W_enc=torch.randn(D_MODEL, D_SAE, generator=generator),
        b_enc=torch.randn(D_SAE, generator=generator),
        W_dec=torch.randn(D_SAE, D_MODEL, generator=generator),
        b_dec=torch.randn(D_MODEL, generator=generator),
        threshold=torch.rand(D_SAE, generator=generator),
        max_activation=maxima,
        sha256=SAE_SHA,
    )


MakePack = Callable[..., ConceptPack]


@pytest.fixture
def card() -> PackCard:
    return PackCard(
        name="mood",
        version="2",
        description="a test pack",
        model=ModelRef(name="toy", fingerprint=FINGERPRINT),
        saes={str(SITE): SAERef(name="toy-sae", sha256=SAE_SHA)},
        sites=[str(SITE)],
        policy=PolicyAction(op=Op.CLAMP, always=True),
        detector=DetectorCard(kind="features", site=str(SITE), threshold=0.5),
        evaluation={"rate": 0.25},
    )


@pytest.fixture
def make_tensors(sae: SAE) -> Callable[..., PackTensors]:
    def make(features: tuple[int, ...] = (1, 3), **changes: np.ndarray) -> PackTensors:
        W_enc, b_enc, threshold, max_norm, W_dec = (rows.numpy() for rows in sae.rows(features))
        count = np.arange(1, len(features) + 1, dtype=np.float32)
        values = {
            "site": np.zeros(len(features), dtype=np.int64),
            "W_enc": W_enc,
            "b_enc": b_enc,
            "threshold": threshold,
            "max_norm": max_norm,
            "W_dec": W_dec,
            "edited": np.ones(len(features), dtype=bool),
            "value": -count,
            "weight": 10 * count,
            "max_activation": 2 * count,
            "feature_ids": np.array(features, dtype=np.int64),
        }
        return PackTensors(**(values | changes))

    return make


@pytest.fixture
def make_pack(card: PackCard, make_tensors: Callable[..., PackTensors], tmp_path: Path) -> MakePack:
    """Save and load a pack; ``name`` and other card fields may be changed."""

    def make(features: tuple[int, ...] = (1, 3), **card_changes: object) -> ConceptPack:
        changed = PackCard.model_validate(card.model_dump() | card_changes)
        return save_pack(changed, make_tensors(features), tmp_path / changed.name)

    return make


@pytest.fixture
def catalog(facts: Facts, sae: SAE, make_pack: MakePack) -> Catalog:
    """One SAE and one pack, ``mood`` of its features 1 and 3."""
    pack = make_pack()
    return Catalog(facts, {sae.name: sae}, {pack.name: pack})
