"""What an intervention aims at: the rows of a feature, of a concept, or of a direction.

A concept is edited at all sites of its pack and read at one: what its policy edits and what its
detector reads may be different rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.packs import ConceptPack
from steerserve.steering.plan import FeatureKey, FeatureRows
from steerserve.types import ConceptTarget, DirectionTarget, FeatureTarget, FloatArray, Site, Target

Identity = tuple[str, int]
"""What a feature is, whoever ships its rows: an SAE's hash and index, or the hash of a direction up to its sign."""

IntpArray = npt.NDArray[np.intp]

ONE = np.ones(1, dtype=np.float32)
ONE.flags.writeable = False


@dataclass(frozen=True, eq=False)
class ResolvedTarget:
    """``k`` features at one site.

    Attributes:
        label: the target in words.
        source: what ``gather_rows`` reads the rows from.
        features: ``[k]`` which of the source's rows.
        keys: ``[k]`` as in ``FeatureRows``.
        identities: ``[k]``; equal for one feature named through its SAE and through a pack.
        weight: ``[k]`` the score that the receipt gives is ``weight · f``.
        recorded: maximum activation of each of the source's rows, if it has any on record.
        pack: the concept pack the rows come from, if any.
    """

    label: str
    site: Site
    source: SAE | FeatureRows
    features: Sequence[int]
    keys: tuple[FeatureKey, ...]
    identities: tuple[Identity, ...]
    weight: FloatArray
    recorded: FloatArray | None = None
    pack: ConceptPack | None = None

    @property
    def max_activation(self) -> list[float] | None:
        """``[k]`` recorded maxima, all positive; None if any is missing."""
        if self.recorded is None:
            return None
        maxima = [float(self.recorded[feature]) for feature in self.features]
        return maxima if all(maximum > 0 for maximum in maxima) else None


def gather_rows(targets: Iterable[ResolvedTarget]) -> FeatureRows:
    """The rows of all targets, each key once; those of one source are read together."""
    seen: set[FeatureKey] = set()
    sources: dict[int, tuple[SAE | FeatureRows, list[int], list[FeatureKey]]] = {}
    for target in targets:
        _, features, keys = sources.setdefault(id(target.source), (target.source, [], []))
        for feature, key in zip(target.features, target.keys, strict=True):
            if key not in seen:
                seen.add(key)
                features.append(feature)
                keys.append(key)
    parts = [_arrays(source, features) for source, features, _ in sources.values()]
    arrays = parts[0] if len(parts) == 1 else [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
    return FeatureRows(tuple(key for _, _, keys in sources.values() for key in keys), *arrays)


def _arrays(source: SAE | FeatureRows, features: list[int]) -> list[FloatArray]:
    """W_enc, b_enc, threshold, max_norm and W_dec of some rows."""
    if isinstance(source, SAE):
        return [rows.numpy() for rows in source.rows(features)]
    whole = (source.W_enc, source.b_enc, source.threshold, source.max_norm, source.W_dec)
    return [rows[features] for rows in whole]


def resolve_edited(target: Target, path: str, catalog: Catalog) -> tuple[ResolvedTarget, ...]:
    """What an edit of the target changes, a target for each site; ``path`` is its field.

    Raises:
        InvalidRequestError: an unknown SAE, feature or concept, or a vector without a direction.
        IncompatibleError: a site or a vector that does not fit the model.
    """
    if isinstance(target, ConceptTarget):
        return edited_rows(catalog.concept(target.concept, f"{path}.concept"))
    return (_resolve_one(target, path, catalog),)


def resolve_read(target: Target, path: str, catalog: Catalog) -> ResolvedTarget:
    """What a monitor, a gate or a guard of the target reads; ``path`` is its field.

    Raises:
        InvalidRequestError: an unknown SAE, feature or concept, or a vector without a direction.
        IncompatibleError: a site or a vector that does not fit the model.
    """
    if isinstance(target, ConceptTarget):
        return detector_rows(catalog.concept(target.concept, f"{path}.concept"))
    return _resolve_one(target, path, catalog)


def edited_rows(pack: ConceptPack) -> tuple[ResolvedTarget, ...]:
    """The rows that a pack's policy edits, site by site; their score is Σ f / max_activation."""
    sites = pack.edited_sites
    return tuple(
        _rows_of(
            pack,
            site,
            np.flatnonzero(pack.at(site).edited),
            label=f"concept {pack.name}" + (f" at {site}" if len(sites) > 1 else ""),
            weight=np.reciprocal(pack.at(site).max_activation),
        )
        for site in sites
    )


def detector_rows(pack: ConceptPack) -> ResolvedTarget:
    """The rows that a pack's detector reads."""
    weight = pack.at(pack.detector_site).weight
    return _rows_of(pack, pack.detector_site, np.flatnonzero(weight), f"concept {pack.name}", weight)


def _rows_of(pack: ConceptPack, site: Site, chosen: IntpArray, label: str, weight: FloatArray) -> ResolvedTarget:
    """The ``chosen`` of a pack's rows at a site; ``weight`` is of all of them."""
    tensors, rows = pack.at(site), pack.rows(site)
    sae = pack.card.saes.get(str(site))
    identities = tuple(
        (f"sae:{sae.sha256}", int(feature)) if sae is not None and feature >= 0 else rows.keys[row]
        for row, feature in zip(chosen, tensors.feature_ids[chosen], strict=True)
    )
    return ResolvedTarget(
        label=label,
        site=site,
        source=rows,
        features=chosen.tolist(),
        keys=tuple(rows.keys[row] for row in chosen),
        identities=identities,
        weight=weight[chosen],
        recorded=tensors.max_activation,
        pack=pack,
    )


def _resolve_one(target: FeatureTarget | DirectionTarget, path: str, catalog: Catalog) -> ResolvedTarget:
    if isinstance(target, FeatureTarget):
        return _resolve_feature(target, path, catalog)
    return _resolve_direction(target, path, catalog)


def _resolve_feature(target: FeatureTarget, path: str, catalog: Catalog) -> ResolvedTarget:
    sae = catalog.sae(target.sae, f"{path}.sae")
    if not 0 <= target.feature < sae.d_sae:
        raise InvalidRequestError(f"{path}.feature", target.feature, f"an integer from 0 to {sae.d_sae - 1}")
    return ResolvedTarget(
        label=f"feature {sae.name}/{target.feature}",
        site=sae.site,
        source=sae,
        features=(target.feature,),
        keys=((f"sae:{sae.name}:{sae.sha256}", target.feature),),
        identities=((f"sae:{sae.sha256 or sae.name}", target.feature),),
        weight=ONE,
        recorded=None if sae.max_activation is None else sae.max_activation.numpy(),
    )


def _resolve_direction(target: DirectionTarget, path: str, catalog: Catalog) -> ResolvedTarget:
    catalog.check_site(target.site, f"{path}.site")
    unit = _unit_vector(target.vector, f"{path}.vector", catalog.model.d_model)
    key = (f"direction:{hashlib.sha256(unit.tobytes()).hexdigest()}", 0)
    line = np.copysign(1.0, unit[np.flatnonzero(unit)[0]]) * unit + 0.0  # v and −v are one; so are 0.0 and −0.0
    zero, unbounded = np.zeros(1, dtype=np.float32), np.full(1, np.inf, dtype=np.float32)
    rows = FeatureRows((key,), unit[None], zero, -unbounded, unbounded, unit[None])
    return ResolvedTarget(
        label=f"direction at {target.site}",
        site=target.site,
        source=rows,
        features=(0,),
        keys=(key,),
        identities=((f"direction:{hashlib.sha256(line.tobytes()).hexdigest()}", 0),),
        weight=ONE,
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
