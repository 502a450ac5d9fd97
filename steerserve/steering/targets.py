"""What an intervention aims at: the rows of a feature, of a concept's features, or of a direction."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.steering.catalog import Catalog
from steerserve.steering.packs import ConceptPack
from steerserve.steering.plan import FeatureRows
from steerserve.types import ConceptTarget, DirectionTarget, FeatureTarget, FloatArray, Site, Target

Identity = tuple[str, int]
"""What a feature is, whoever ships its rows: an SAE's hash and index, or the hash of a direction."""


@dataclass(frozen=True, eq=False)
class ResolvedTarget:
    """``k`` features at one site.

    Attributes:
        label: the target in words.
        identities: ``[k]``; equal for one feature named through its SAE and through a pack.
        weight: ``[k]`` the target's score is ``weight · f``.
        max_activation: ``[k]`` recorded maxima, all positive; None if any is missing.
        pack: the concept pack the rows come from, if any.
    """

    label: str
    site: Site
    rows: FeatureRows
    identities: tuple[Identity, ...]
    weight: FloatArray
    max_activation: FloatArray | None
    pack: ConceptPack | None = None


def resolve_target(target: Target, path: str, catalog: Catalog) -> ResolvedTarget:
    """Look a target up in the catalog; ``path`` is its field.

    Raises:
        InvalidRequestError: an unknown SAE, feature or concept, or a vector without a direction.
        IncompatibleError: a site or a vector that does not fit the model.
    """
    match target:
        case FeatureTarget():
            return _resolve_feature(target, path, catalog)
        case ConceptTarget():
            return resolve_concept(catalog.concept(target.concept, f"{path}.concept"))
        case DirectionTarget():
            return _resolve_direction(target, path, catalog)


def resolve_concept(pack: ConceptPack) -> ResolvedTarget:
    """All features of a pack."""
    tensors = pack.tensors
    origin = f"sae:{pack.card.sae.sha256}" if pack.card.sae is not None else ""
    rows = pack.rows()
    identities = tuple(
        (origin, int(feature)) if feature >= 0 else key
        for feature, key in zip(tensors.feature_ids, rows.keys, strict=True)
    )
    return ResolvedTarget(
        label=f"concept {pack.name}",
        site=pack.site,
        rows=rows,
        identities=identities,
        weight=tensors.weight,
        max_activation=_if_all_positive(tensors.max_activation),
        pack=pack,
    )


def _resolve_feature(target: FeatureTarget, path: str, catalog: Catalog) -> ResolvedTarget:
    sae = catalog.sae(target.sae, f"{path}.sae")
    if not 0 <= target.feature < sae.d_sae:
        raise InvalidRequestError(f"{path}.feature", target.feature, f"an integer from 0 to {sae.d_sae - 1}")
    rows = FeatureRows(
        ((f"sae:{sae.name}:{sae.sha256}", target.feature),), *(t.numpy() for t in sae.rows([target.feature]))
    )
    recorded = None if sae.max_activation is None else sae.max_activation[target.feature : target.feature + 1].numpy()
    return ResolvedTarget(
        label=f"feature {sae.name}/{target.feature}",
        site=sae.site,
        rows=rows,
        identities=((f"sae:{sae.sha256 or sae.name}", target.feature),),
        weight=np.ones(1, dtype=np.float32),
        max_activation=None if recorded is None else _if_all_positive(recorded),
    )


def _resolve_direction(target: DirectionTarget, path: str, catalog: Catalog) -> ResolvedTarget:
    catalog.check_site(target.site, f"{path}.site")
    unit = _unit_vector(target.vector, f"{path}.vector", catalog.model.d_model)
    key = (f"direction:{hashlib.sha256(unit.tobytes()).hexdigest()}", 0)
    zero, unbounded = np.zeros(1, dtype=np.float32), np.full(1, np.inf, dtype=np.float32)
    rows = FeatureRows((key,), unit[None], zero, -unbounded, unbounded, unit[None])
    return ResolvedTarget(
        label=f"direction at {target.site}",
        site=target.site,
        rows=rows,
        identities=(key,),
        weight=np.ones(1, dtype=np.float32),
        max_activation=None,
    )


def _unit_vector(vector: FloatArray, field: str, d_model: int) -> FloatArray:
    if vector.shape != (d_model,):
        raise IncompatibleError(field, list(vector.shape), f"shape [{d_model}], the width of the model")
    if not np.isfinite(vector).all():
        raise InvalidRequestError(field, "NaN or infinite values", "finite values")
    exact = vector.astype(np.float64)
    length = np.linalg.norm(exact)
    if length == 0:
        raise InvalidRequestError(field, "the zero vector", "a vector with a direction")
    return (exact / length).astype(np.float32)


def _if_all_positive(recorded: FloatArray) -> FloatArray | None:
    return recorded if (recorded > 0).all() else None
