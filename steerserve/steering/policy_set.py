"""The policies of some files: read together, checked together, replaced together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from steerserve.errors import AssetError, FieldError, PolicyError
from steerserve.steering.bound_policies import bind_policy
from steerserve.steering.catalog import ASSETS
from steerserve.steering.packs import ConceptPack, ModelFacts
from steerserve.steering.policies import Policy, Rule, read_policy
from steerserve.steering.refusals import refuse_double_edits
from steerserve.strict_yaml import located
from steerserve.types import Op

BUILT_IN = ASSETS / "policies"


@dataclass(frozen=True)
class PolicyChanges:
    """What one set has that another had not; ``name@version`` each."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        parts = [f"{kind} {', '.join(tags)}" for kind, tags in vars(self).items() if tags]
        return "; ".join(parts) or "no change"


@dataclass(frozen=True, eq=False)
class PolicySet:
    """An immutable snapshot, checked against the concept packs that are loaded.

    Attributes:
        policies: by name; one version of each.
    """

    policies: Mapping[str, Policy] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Path, packs: Mapping[str, ConceptPack], model: ModelFacts | None = None) -> PolicySet:
        """Read a file, or every ``*.yaml`` of a directory.

        Args:
            model: whose heads the policies edit; None: that it has them is seen only where a server reads them.

        Raises:
            PolicyError: names everything that is wrong with any of them.
            AssetError: nothing is there.
        """
        return cls._checked([(path, read) for path, read in _readable(policy_files(source))], packs, model)

    @classmethod
    def built_in(cls, packs: Mapping[str, ConceptPack]) -> PolicySet:
        """Those that come with the package and name loaded concepts alone."""
        read = [(path, read_policy(path)) for path in policy_files(BUILT_IN)]
        return cls._checked([(path, p) for path, p in read if packs.keys() >= set(p.concepts)], packs)

    @classmethod
    def _checked(
        cls, read: Sequence[tuple[Path, Policy]], packs: Mapping[str, ConceptPack], model: ModelFacts | None = None
    ) -> PolicySet:
        problems: list[str] = []
        files: dict[str, Path] = {}
        for path, policy in read:
            first = files.setdefault(policy.name, path)
            if first is not path:
                problems.append(located(path, f"name: got {policy.name!r}, expected another: {first} has it"))
            problems += [located(path, problem) for problem in problems_of(policy, packs, model)]
        if problems:
            raise PolicyError(problems)
        return cls({policy.name: policy for _, policy in read})

    def changes_since(self, before: PolicySet) -> PolicyChanges:
        """What replacing ``before`` by this changes.

        Raises:
            PolicyError: a policy changed and kept its version: receipts would no longer say what ran.
        """
        new, old = self.policies, before.policies
        differ = [name for name in new if name in old and new[name] != old[name]]
        silent = [new[name].tag for name in differ if new[name].version == old[name].version]
        if silent:
            raise PolicyError([f"{tag}: changed, expected another version than the one in force" for tag in silent])
        return PolicyChanges(
            added=tuple(policy.tag for name, policy in new.items() if name not in old),
            changed=tuple(new[name].tag for name in differ),
            removed=tuple(policy.tag for name, policy in old.items() if name not in new),
        )


def policy_files(source: Path) -> list[Path]:
    """The files of a directory in the order of their names, or a single one.

    Raises:
        AssetError: nothing is there.
    """
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.suffix in (".yaml", ".yml"))
    if source.is_file():
        return [source]
    raise AssetError(f"{source}: no policy file or directory of policy files is there")


def problems_of(policy: Policy, packs: Mapping[str, ConceptPack], model: ModelFacts | None = None) -> list[str]:
    """What the schema cannot see: names that are taken or unknown, and terms that do not fit the packs or the model."""
    problems = []
    if policy.name in packs:
        problems.append(f"name: got {policy.name!r}, expected another: the concept pack of it is a policy already")
    known = ", ".join(sorted(packs)) or "none is loaded"
    for index, rule in enumerate(policy.rules):
        if rule.concept is None:
            continue
        if rule.concept not in packs:
            problems.append(f"rules[{index}].concept: got {rule.concept!r}, expected a loaded concept: {known}")
        elif _lacks_calibration(rule, packs[rule.concept]):
            expected = f"an edit written out: concept {rule.concept} has no calibrated one"
            problems.append(f"rules[{index}].edit: got 'calibrated', expected {expected}")
    for index, concept in enumerate(policy.limits.concepts or ()):
        if concept not in packs:
            problems.append(f"limits.concepts[{index}]: got {concept!r}, expected a loaded concept: {known}")
    if problems:
        return problems
    try:
        refuse_double_edits(bind_policy(policy, packs, model).edits)
    except FieldError as error:
        return [str(error)]
    return []


def _lacks_calibration(rule: Rule, pack: ConceptPack) -> bool:
    return rule.applied_edit == "calibrated" and pack.card.policy.op is Op.MONITOR


def _readable(paths: Iterable[Path]) -> Iterator[tuple[Path, Policy]]:
    """Every file read; one error for all that cannot be."""
    problems: list[str] = []
    for path in paths:
        try:
            yield path, read_policy(path)
        except PolicyError as error:
            problems += error.problems
    if problems:
        raise PolicyError(problems)
