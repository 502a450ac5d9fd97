"""The policies a server has in force follow the files they are written in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from steerserve.config import PolicyConfig
from steerserve.engine.engine import Engine
from steerserve.errors import CapacityError, SteerserveError
from steerserve.steering.policy_set import PolicyChanges, PolicySet, policy_files

_log = logging.getLogger(__name__)

_Signature = tuple[tuple[str, int, int, int], ...]


class PolicyFiles:
    """Reads the files that ``config`` names, and puts them in force all at once or not at all."""

    def __init__(self, engine: Engine, config: PolicyConfig) -> None:
        self._engine = engine
        self._directory = None if config.directory is None else Path(config.directory)
        self._watch_s = config.watch_s
        self._seen = self._signature()
        self._asked = asyncio.Event()

    def reload(self, approve: Callable[[frozenset[str]], object] = lambda names: None) -> PolicyChanges:
        """Read everything again; from any thread.

        Args:
            approve: called with the names, and ``name@version``, of all policies that there will be; what it raises
                keeps those in force.

        Raises:
            PolicyError, AssetError: what is wrong with the files. The policies in force stay.
            CapacityError: requests hold too many features of the bank. The policies in force stay.
        """
        seen = self._signature()  # before they are read: what is written meanwhile is another change
        policies = self._read()
        approve(self._names(policies))
        changes = self._engine.replace_policies(policies)
        self._seen = seen
        return changes

    def ask(self) -> None:
        """Have ``watch`` reload now; from its event loop."""
        self._asked.set()

    async def watch(self) -> None:
        """Reload whenever a file has changed, or somebody asks, until cancelled; what is wrong goes to the log."""
        while True:
            try:
                async with asyncio.timeout(self._watch_s or None):
                    await self._asked.wait()
            except TimeoutError:
                if await asyncio.to_thread(self._signature) == self._seen:
                    continue
            self._asked.clear()
            await asyncio.to_thread(self._try_reload)

    def _try_reload(self) -> None:
        seen = self._signature()
        try:
            changes = self.reload()
        except CapacityError as error:
            _log.warning("policies are not reloaded yet: %s", error)
        except SteerserveError as error:
            _log.error("policies are not reloaded, those in force stay: %s", error)
            self._seen = seen  # not again until it is mended
        else:
            _log.info("policies reloaded: %s", changes)

    def _read(self) -> PolicySet:
        packs = self._engine.catalog.packs
        if self._directory is not None:
            return PolicySet.read(self._directory, packs, self._engine.model)
        sites = self._engine.sites
        return PolicySet.built_in({name: pack for name, pack in packs.items() if sites.issuperset(pack.sites)})

    def _names(self, policies: PolicySet) -> frozenset[str]:
        packs = self._engine.catalog.packs
        tags = [*(pack.tag for pack in packs.values()), *(policy.tag for policy in policies.policies.values())]
        return frozenset([*packs, *policies.policies, *tags])

    def _signature(self) -> _Signature:
        """Changes whenever a file does."""
        if self._directory is None:
            return ()
        try:
            stats = [(path.name, path.stat()) for path in policy_files(self._directory)]
        except (OSError, SteerserveError):
            return ()
        return tuple((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats)
