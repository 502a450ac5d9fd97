"""Preallocated feature rows, shared by every request that uses the same feature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from steerserve.errors import CapacityError, InvalidRequestError
from steerserve.kernels.steer_delta import Normalization
from steerserve.models.splice import SiteBank
from steerserve.steering.plan import FeatureKey, FeatureRows, IntArray, Plan, SitePlan
from steerserve.types import Site


@dataclass
class _SiteRows:
    """One site's buffers: which slot holds which feature, and how many plans hold it."""

    arrays: SiteBank
    free: list[int]
    slot: dict[FeatureKey, int] = field(default_factory=dict)
    holders: dict[FeatureKey, int] = field(default_factory=dict)


class FeatureBank:
    """Buffers of ``capacity`` feature rows a site, allocated when the site is first used.

    A slot is written only while no plan holds it, so the kernel may read the others meanwhile.
    Callers serialise ``acquire``, ``release`` and ``pin``.

    Args:
        width: of the activation at a site.
    """

    def __init__(self, capacity: int, width: Callable[[Site], int]) -> None:
        self._capacity = capacity
        self._width = width
        self._sites: dict[Site, _SiteRows] = {}
        self._pinned: list[Plan] = []

    def pin(self, plans: Sequence[Plan]) -> None:
        """Hold the features of ``plans`` whatever requests come, instead of those that were pinned before.

        Raises:
            CapacityError: requests hold the slots that are missing. Nothing changes then.
            InvalidRequestError: there are fewer slots than features. Nothing changes then.
        """
        held: list[Plan] = []
        try:
            for plan in plans:
                self.acquire(plan)
                held.append(plan)
        except (InvalidRequestError, CapacityError):
            for plan in held:
                self.release(plan)
            raise
        for plan in self._pinned:
            self.release(plan)
        self._pinned = held

    def acquire(self, plan: Plan) -> list[list[IntArray]]:
        """Hold every feature of a plan: for each level and each ``SitePlan`` of it, the slots ``[k]`` of its rows.

        Raises:
            InvalidRequestError: the plan alone has more features at a site than there are slots.
            CapacityError: the slots are held by other requests. Nothing is held after either.
        """
        held: list[IntArray] = []
        parts = _parts(plan)
        try:
            for part in parts:
                held.append(self._hold(part.site, part.rows, _distinct_features(parts, part.site)))
        except (InvalidRequestError, CapacityError):
            self._drop(parts[: len(held)])
            raise
        slots = iter(held)
        return [[next(slots) for _ in level] for level in plan.levels]

    def release(self, plan: Plan) -> None:
        """Undo one ``acquire``."""
        self._drop(_parts(plan))

    def arrays(self, site: Site) -> SiteBank:
        """The buffers of a site; allocated when they are first asked for."""
        return self._at(site).arrays

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        arrays = (getattr(rows.arrays, name) for rows in self._sites.values() for name in vars(rows.arrays))
        return sum(array.nbytes for array in arrays)

    def _at(self, site: Site) -> _SiteRows:
        if site not in self._sites:
            self._sites[site] = self._allocate(self._width(site))
        return self._sites[site]

    @property
    def num_held(self) -> int:
        """Slots that requests use, over all sites; those that are merely pinned left out."""
        pins = Counter((part.site, key) for plan in self._pinned for part in _parts(plan) for key in part.rows.keys)
        return sum(count > pins[site, key] for site, rows in self._sites.items() for key, count in rows.holders.items())

    def _hold(self, site: Site, features: FeatureRows, distinct: int) -> IntArray:
        if distinct > self._capacity:
            expected = f"at most {self._capacity} distinct features at one site"
            raise InvalidRequestError("steering.interventions", f"{distinct} features at {site}", expected)
        rows = self._at(site)
        new = [index for index, key in enumerate(features.keys) if key not in rows.slot]
        if len(new) > len(rows.free):
            raise CapacityError(f"no room for {len(new)} more features at {site}: all slots are in use")
        if new:
            slots = [rows.free.pop() for _ in new]
            rows.slot.update(zip((features.keys[index] for index in new), slots, strict=True))
            _write(rows.arrays, slots, features, new)
        for key in features.keys:
            rows.holders[key] = rows.holders.get(key, 0) + 1
        return np.array([rows.slot[key] for key in features.keys], dtype=np.int32)

    def _drop(self, parts: Sequence[SitePlan]) -> None:
        for part in parts:
            rows = self._sites[part.site]
            for key in part.rows.keys:
                rows.holders[key] -= 1
                if rows.holders[key] == 0:
                    del rows.holders[key]
                    rows.free.append(rows.slot.pop(key))

    def _allocate(self, width: int) -> _SiteRows:
        def buffer(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32)

        size = self._capacity
        arrays = SiteBank(
            W_enc=buffer(size, width),
            b_enc=buffer(size),
            threshold=buffer(size),
            max_norm=buffer(size),
            normalization=torch.full((size,), Normalization.NONE, dtype=torch.uint8),
            W_dec=buffer(size, width),
        )
        return _SiteRows(arrays, free=list(range(size - 1, -1, -1)))


def _parts(plan: Plan) -> list[SitePlan]:
    return [part for level in plan.levels for part in level]


def _distinct_features(parts: Sequence[SitePlan], site: Site) -> int:
    return len({key for part in parts if part.site == site for key in part.rows.keys})


def _write(arrays: SiteBank, slots: list[int], features: FeatureRows, index: list[int]) -> None:
    where = torch.tensor(slots)
    arrays.W_enc[where] = torch.from_numpy(features.W_enc[index])
    arrays.b_enc[where] = torch.from_numpy(features.b_enc[index])
    arrays.threshold[where] = torch.from_numpy(features.threshold[index])
    arrays.max_norm[where] = torch.from_numpy(features.max_norm[index])
    arrays.W_dec[where] = torch.from_numpy(features.W_dec[index])
