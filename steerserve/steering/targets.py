"""What an intervention aims at: the rows of a feature, of a concept, of a direction, or of a head.

A concept is edited at all sites of its pack and read at one: what its policy edits and what its
detector reads may be different rows. A head is as many features as its output has values, each of which is one of
them: a head is scaled by the kernel that edits features, with its gates, stages and counters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steerserve.errors import IncompatibleError, InvalidRequestError
from steerserve.sae.model import SAE
from steerserve.steering.catalog import Catalog
from steerserve.steering.packs import ConceptPack, ModelFacts, check_head, check_site, width_of
from steerserve.steering.plan import FeatureKey, FeatureRows
from steerserve.types import (
    ConceptTarget,
    DirectionTarget,
    FeatureTarget,
    FloatArray,
    HeadTarget,
    Site,
    Stream,
    Target,
)

Identity = tuple[str, int]
"""What a feature is, whoever ships its rows: an SAE's hash and index, the hash of a direction up to its sign, or "z"
where a value stands among the heads' outputs."""

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
        IncompatibleError: a site, a head or a vector that does not fit the model.
    """
    match target:
        case ConceptTarget(concept):
            return edited_rows(catalog.concept(concept, f"{path}.concept"))
        case HeadTarget():
            return (resolve_head(target, path, catalog.model),)
        case FeatureTarget():
            return (_resolve_feature(target, path, catalog),)
        case DirectionTarget():
            return (_resolve_direction(target, path, catalog),)


def resolve_read(target: Target, path: str, catalog: Catalog) -> ResolvedTarget:
    """What a monitor, a gate or a guard of the target reads; ``path`` is its field.

    Raises:
        InvalidRequestError: an unknown SAE, feature or concept, a vector without a direction, or a head without one.
        IncompatibleError: a site, a head or a vector that does not fit the model.
    """
    match target:
        case ConceptTarget(concept):
            return detector_rows(catalog.concept(concept, f"{path}.concept"))
        case HeadTarget():
            expected = "a direction of the head to read: a head alone has no score"
            raise InvalidRequestError(path, f"head {target}", expected)
        case FeatureTarget():
            return _resolve_feature(target, path, catalog)
        case DirectionTarget():
            return _resolve_direction(target, path, catalog)


def resolve_head(head: HeadTarget, path: str, model: ModelFacts) -> ResolvedTarget:
    """The values of a head's output; they have no score.

    Raises:
        IncompatibleError: the model has no such head.
    """
    check_site(head.site, f"{path}.layer", model)
    check_head(head, f"{path}.head", model)
    columns = _columns(head.head, model)
    axes = np.zeros((model.d_head, width_of(model, head.site)), dtype=np.float32)
    axes[np.arange(model.d_head), columns] = 1.0
    keys = tuple(("z", column) for column in columns)
    zeros, unbounded = np.zeros(model.d_head, dtype=np.float32), np.full(model.d_head, np.inf, dtype=np.float32)
    return ResolvedTarget(
        label=f"head {head}",
        site=head.site,
        source=FeatureRows(keys, axes, zeros, -unbounded, unbounded, axes),
        features=range(model.d_head),
        keys=keys,
        identities=keys,
        weight=zeros,
    )


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
    field, model = f"{path}.vector", catalog.model
    check_site(target.site, f"{path}.site", model)
    if target.head is None:
        unit = _unit_vector(target.vector, field, {width_of(model, target.site): f"the width of {target.site}"})
        return _line(f"direction at {target.site}", target.site, unit, unit)
    if target.site.stream is not Stream.ATTN_Z:
        heads = Site(target.site.layer, Stream.ATTN_Z)
        raise InvalidRequestError(f"{path}.head", target.head, f"none: {target.site} has no heads, {heads} has")
    head = HeadTarget(target.site.layer, target.head)
    check_head(head, f"{path}.head", model)
    widths = {model.d_model: "of the residual stream", model.d_head: f"of the output of {head}"}
    unit = _unit_vector(target.vector, field, widths)
    columns = _columns(head.head, model)
    placed = np.zeros((2, width_of(model, head.site)), dtype=np.float32)
    if len(unit) == model.d_head:
        placed[:, columns] = unit
        return _line(f"direction of head {head}", head.site, *placed)
    placed[:, columns] = _pulled_back(unit, head, field, model)
    return _line(f"direction that head {head} writes to", head.site, *placed)


def _columns(head: int, model: ModelFacts) -> range:
    """Where a head's output stands among those of all heads."""
    return range(head * model.d_head, (head + 1) * model.d_head)


def _pulled_back(unit: FloatArray, head: HeadTarget, field: str, model: ModelFacts) -> FloatArray:
    """``[2, d_head]``: w = W_O u, whose product with the head's output is what it writes along u, and w / |w|², the
    shortest edit of the output that writes 1 more."""
    read = model.head_writes(head.layer, head.head).astype(np.float64) @ unit
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        both = np.stack([read, read / (read @ read)]).astype(np.float32)
    if not np.isfinite(both).all():
        raise InvalidRequestError(field, "one that it does not", f"a direction that head {head} writes to")
    return both


def _line(label: str, site: Site, read: FloatArray, write: FloatArray) -> ResolvedTarget:
    """One feature without a threshold: f = x · read, and what edits it adds multiples of ``write``."""
    key = (f"direction:{_sha256(np.concatenate([read, write]))}", 0)
    unit = (read / np.linalg.norm(read.astype(np.float64))).astype(np.float32)
    either_way = np.copysign(1.0, unit[np.flatnonzero(unit)[0]]) * unit + 0.0  # v and −v are one; so are 0.0 and −0.0
    zero, unbounded = np.zeros(1, dtype=np.float32), np.full(1, np.inf, dtype=np.float32)
    return ResolvedTarget(
        label=label,
        site=site,
        source=FeatureRows((key,), read[None], zero, -unbounded, unbounded, write[None]),
        features=(0,),
        keys=(key,),
        identities=((f"direction:{_sha256(either_way)}", 0),),
        weight=ONE,
    )


def _sha256(vector: FloatArray) -> str:
    return hashlib.sha256(vector.tobytes()).hexdigest()


def _unit_vector(vector: FloatArray, field: str, widths: Mapping[int, str]) -> FloatArray:
    """``vector`` of length 1; ``widths`` are those it may have, each with its meaning."""
    if vector.ndim != 1 or len(vector) not in widths:
        expected = " or ".join(f"[{width}], {meaning}" for width, meaning in widths.items())
        raise IncompatibleError(field, list(vector.shape), f"shape {expected}")
    if not np.isfinite(vector).all():
        raise InvalidRequestError(field, "NaN or infinite values", "finite values")
    exact = vector.astype(np.float64)
    length = np.linalg.norm(exact)
    if length == 0:
        raise InvalidRequestError(field, "the zero vector", "a vector with a direction")
    return (exact / length).astype(np.float32)
