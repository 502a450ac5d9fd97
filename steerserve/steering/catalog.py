"""The SAEs, concept packs and policies that are loaded for one model, found by name.

A catalog never changes: whoever replaces the policies makes another one, and what was compiled against the old one
stays as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as data_field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from steerserve.errors import AssetError, IncompatibleError, InvalidRequestError
from steerserve.sae.model import SAE
from steerserve.sae.registry import load_sae
from steerserve.steering.pack_files import load_pack
from steerserve.steering.packs import ConceptPack, ModelFacts, width_of
from steerserve.steering.policies import Policy, policy_of
from steerserve.types import Site

ASSETS = Path(__file__).parent.parent / "assets"
MAX_NAMES_IN_ERRORS = 8

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Catalog:
    """What a request may name.

    Attributes:
        policy_files: the policies that were read from files, by name; every pack is one besides.
    """

    model: ModelFacts
    saes: Mapping[str, SAE]
    packs: Mapping[str, ConceptPack]
    policy_files: Mapping[str, Policy] = data_field(default_factory=dict)

    @classmethod
    def load(cls, model: ModelFacts, packs: Sequence[str] = (), saes: Sequence[str] = ()) -> Catalog:
        """Load packs and SAEs, each a directory or the name of a built-in one.

        Raises:
            AssetError: missing or damaged files, or a name given twice.
            IncompatibleError: made for another model than ``model``, or an SAE whose features cannot be edited.
        """
        loaded_saes = [load_sae(_directory(name, "saes")) for name in saes]
        loaded_packs = [load_pack(_directory(name, "packs")) for name in packs]
        for sae in loaded_saes:
            check_sae(sae, model)
            refuse_unsteerable(sae)
        for pack in loaded_packs:
            pack.check_model(model)
        return cls(
            model,
            _by_name("SAE", [(sae.name, sae) for sae in loaded_saes]),
            _by_name("concept pack", [(pack.name, pack) for pack in loaded_packs]),
        )

    @property
    def sites(self) -> list[Site]:
        """The sites of the SAEs and packs, in model order."""
        of_packs = {site for pack in self.packs.values() for site in pack.sites}
        return sorted({sae.site for sae in self.saes.values()} | of_packs)

    def sae(self, name: str, field: str) -> SAE:
        """A loaded SAE; ``field`` names where the request said so.

        Raises:
            InvalidRequestError: no such SAE.
        """
        return _find(self.saes, name, field, "SAE")

    def concept(self, name: str, field: str) -> ConceptPack:
        """The pack of a concept.

        Raises:
            InvalidRequestError: no such concept.
        """
        return _find(self.packs, name, field, "concept")

    @cached_property
    def policies(self) -> Mapping[str, Policy]:
        """By name: a policy for each pack, its calibrated action, and those of files."""
        return {name: policy_of(pack) for name, pack in self.packs.items()} | dict(self.policy_files)

    def policy(self, name: str, field: str) -> Policy:
        """A policy given as ``name`` or ``name@version``.

        Raises:
            InvalidRequestError: no such policy, or another version of it is loaded.
        """
        bare, _, version = name.partition("@")
        if bare not in self.policies:
            tags = [policy.tag for policy in self.policies.values()]
            raise InvalidRequestError(field, name, _choices(name, tags, "policy"))
        policy = self.policies[bare]
        if "@" in name and version != policy.version:
            raise InvalidRequestError(field, name, f"the loaded version, {policy.tag}")
        return policy


def _directory(name: str, kind: str) -> Path:
    for directory in (Path(name), ASSETS / kind / name):
        if directory.is_dir():
            return directory
    built_in = sorted(path.name for path in (ASSETS / kind).glob("*") if path.is_dir())
    raise AssetError(f"{name!r} is neither a directory nor one of the built-in {kind}: {', '.join(built_in) or 'none'}")


def _by_name(kind: str, items: Iterable[tuple[str, T]]) -> dict[str, T]:
    named: dict[str, T] = {}
    for name, item in items:
        if name in named:
            raise AssetError(f"two loaded {kind}s are named {name!r}")
        named[name] = item
    return named


def check_sae(sae: SAE, model: ModelFacts) -> None:
    """Refuse an SAE that was not made for ``model``, whether or not its features can be edited.

    Raises:
        IncompatibleError: other weights, another width, or a layer that the model lacks.
    """
    trained_on = sae.metadata.get("model_fingerprint", model.fingerprint)  # foreign SAEs record none
    if trained_on != model.fingerprint:
        expected = f"the fingerprint of the served {model.name}, {model.fingerprint}"
        raise IncompatibleError("sae.metadata.model_fingerprint", trained_on, expected)
    for field, width, site in (("sae.d_in", sae.d_in, sae.site), ("sae.d_out", sae.d_out, sae.out_site)):
        if width != width_of(model, site):
            raise IncompatibleError(field, width, f"{width_of(model, site)}, the width of {model.name} at {site}")
    for field, site in (("sae.site", sae.site), ("sae.out_site", sae.out_site)):
        if site.layer >= model.n_layers:
            raise IncompatibleError(field, str(site), f"a layer below {model.n_layers}, as {model.name} has")


def refuse_unsteerable(sae: SAE) -> None:
    """Refuse an SAE whose features cannot be edited one by one.

    Raises:
        IncompatibleError: with the reason.
    """
    reason = sae.why_not_steerable()
    if reason is not None:
        expected = f"an SAE whose features can be edited one by one: {sae.name} {reason}"
        raise IncompatibleError("sae", sae.name, expected)


def _find(named: Mapping[str, T], name: str, field: str, kind: str) -> T:
    if name not in named:
        raise InvalidRequestError(field, name, _choices(name, list(named), kind))
    return named[name]


def _choices(name: str, names: Sequence[str], kind: str) -> str:
    if not names:
        return f"nothing: no {kind} is loaded"
    if len(names) <= MAX_NAMES_IN_ERRORS:
        return f"a loaded {kind}: {', '.join(sorted(names))}"
    nearest = difflib.get_close_matches(name, names, n=MAX_NAMES_IN_ERRORS, cutoff=0.0)
    return f"a loaded {kind}, such as {', '.join(nearest)} ({len(names)} in all)"
