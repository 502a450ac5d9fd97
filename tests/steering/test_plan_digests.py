"""What the plan's hash and its digests for the prefix cache tell apart, and what they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from steering_specs import ONES, SITE, concept, direction, feature, gate, guard, rewind, spec

from steerserve.steering.catalog import Catalog
from steerserve.steering.compiler import compile_plan
from steerserve.steering.packs import PolicyAction
from steerserve.steering.plan import Plan
from steerserve.types import DirectionTarget, GuardAction, Op, Phase, Rewind, Site, Stream

PHASES = (Phase.PROMPT, Phase.GENERATED)
EARLY = Site(0, Stream.MLP_OUT)


def add(index: int = 1, value: float = 1.0, **rest):
    return feature(index, Op.ADD, value, **rest)


DISTINCT = {
    "base": (spec(add()), ()),
    "value": (spec(add(value=2.0)), ()),
    "feature": (spec(add(2)), ()),
    "op": (spec(feature(1, Op.CLIP, 1.0)), ()),
    "no op": (spec(feature(1, Op.MONITOR)), ()),
    "clamp": (spec(feature(1, Op.CLAMP, 1.0)), ()),
    "always": (spec(feature(1, Op.CLAMP, 1.0, always=True)), ()),
    "direction": (spec(direction(Op.ADD, 1.0)), ()),
    "its sign": (spec(direction(Op.ADD, 1.0, vector=-ONES)), ()),
    "its site": (spec(direction(Op.ADD, 1.0, site=EARLY)), ()),
    "its stream": (spec(direction(Op.ADD, 1.0, site=replace(SITE, stream=Stream.RESID_PRE))), ()),
    "two": (spec(add(1), add(2)), ()),
    "order of two": (spec(add(2), add(1)), ()),
    "twice one value": (spec(add(1), add(2, 2.0)), ()),
    "concept": (spec(concept()), ()),
    "its features one by one": (spec(feature(1), feature(3)), ()),
    "stage": (spec(), ("blocker",)),
    "the same from another pack": (spec(concept(name="blocker")), ()),
    "both": (spec(concept(name="blocker")), ("blocker",)),
    "gate": (spec(add(gate=gate(2))), ()),
    "gate's feature": (spec(add(gate=gate(3))), ()),
    "gate's threshold": (spec(add(gate=gate(2, 0.6))), ()),
    "gate's site": (spec(add(gate=gate(DirectionTarget(EARLY, ONES)))), ()),
    "edit and monitor": (spec(add(), feature(2, Op.MONITOR)), ()),
    "gate's threshold, past what its label shows": (spec(add(gate=gate(2, 0.5000001))), ()),
    "which gate": (spec(*(add(i, gate=gate(j)) for i, j in enumerate([4, 5, 4, 5]))), ()),
    "which other": (spec(*(add(i, gate=gate(j)) for i, j in enumerate([4, 5, 5, 4]))), ()),
    "whether gated": (spec(*(add(i, gate=gate(j)) for i, j in enumerate([4, 5])), add(2), add(3)), ()),
    "guard": (spec(guards=(guard(2),)), ()),
    "guard's threshold": (spec(guards=(guard(2, 0.6),)), ()),
    "guard's feature": (spec(guards=(guard(3),)), ()),
    "guard's action": (spec(guards=(guard(2, action=GuardAction.BLOCK),)), ()),
    "guard's failure": (spec(guards=(guard(2, fail_open=True),)), ()),
    "two guards": (spec(guards=(guard(2), guard(2))), ()),
    "guard that rewinds": (spec(guards=(guard(2, rewind=rewind(feature(1))),)), ()),
}
"""Every one runs something else than every other at every position."""


@pytest.fixture
def packs(catalog, make_pack) -> Catalog:
    """Besides ``mood``, a ``blocker`` of the same features."""
    blocker = make_pack(name="blocker", policy=PolicyAction(op=Op.BLOCK))
    return replace(catalog, packs={**catalog.packs, "blocker": blocker})


def digests(plan: Plan) -> list[bytes]:
    return [plan.effective_digest(level, phase) for level in range(len(plan.levels)) for phase in PHASES]


@pytest.mark.parametrize("phase", PHASES)
def test_the_digest_covers_everything_that_runs_at_a_position(phase, packs) -> None:
    named = {name: compile_plan(*variant, packs).effective_digest(0, phase) for name, variant in DISTINCT.items()}
    seen: dict[bytes, str] = {b"": "nothing"}
    for name, digest in named.items():
        assert digest not in seen, f"{name!r} has the digest of {seen[digest]!r}"
        seen[digest] = name
    again = {name: compile_plan(*variant, packs).effective_digest(0, phase) for name, variant in DISTINCT.items()}
    assert again == named
    assert {len(digest) for digest in named.values()} == {32}


def test_the_digest_covers_the_packs_version(catalog, make_pack) -> None:
    newer = replace(catalog, packs={"mood": make_pack(version="3")})
    for asked in [(spec(concept()), ()), (spec(), ("mood",)), (spec(guards=(guard(concept().target),)), ())]:
        old, new = compile_plan(*asked, catalog), compile_plan(*asked, newer)
        assert not set(digests(old)) & set(digests(new))
        assert old.hash != new.hash


def test_the_digest_covers_the_saes_weights(catalog, sae) -> None:
    other = replace(catalog, saes={"toy-sae": replace(sae, sha256="b" * 64)})
    old, new = (compile_plan(spec(add()), (), each) for each in (catalog, other))
    assert not set(digests(old)) & set(digests(new))


def test_only_what_covers_the_phase_counts(catalog) -> None:
    everywhere, prompt = (compile_plan(spec(add(phase=p)), (), catalog) for p in (Phase.ALL, Phase.PROMPT))
    assert digests(everywhere)[0] == digests(everywhere)[1] == digests(prompt)[0]
    assert digests(prompt)[1] == b""
    late = spec(add(phase=Phase.GENERATED), guards=(guard(phase=Phase.GENERATED),))
    assert compile_plan(late, (), catalog).effective_digest(0, Phase.PROMPT) == b""
    assert digests(compile_plan(spec(), (), catalog)) == [b"", b""]


def test_counts_must_belong_to_the_same_interventions(catalog) -> None:
    behind = feature(2, Op.MONITOR, phase=Phase.GENERATED)
    alone, first, second = (
        compile_plan(spec(*asked), (), catalog) for asked in ([add()], [add(), behind], [behind, add()])
    )
    prompt = [plan.effective_digest(0, Phase.PROMPT) for plan in (alone, first, second)]
    assert prompt[0] == prompt[1] != prompt[2]


def test_scores_must_stand_in_lines_of_the_same_length(catalog) -> None:
    gated = add(gate=gate(4))
    later = [gated, add(2, phase=Phase.GENERATED, gate=gate(5))]
    plans = [compile_plan(spec(*asked), (), catalog) for asked in (later, [gated, replace(later[1], gate=None)])]
    assert [len(plan.scores) for plan in plans] == [2, 1]
    assert plans[0].effective_digest(0, Phase.PROMPT) != plans[1].effective_digest(0, Phase.PROMPT)


def test_every_level_has_its_own_digest(catalog) -> None:
    def plan(*edits, retries: int = 3) -> Plan:
        return compile_plan(spec(add(), guards=(guard(rewind=rewind(*edits, max_retries=retries)),)), (), catalog)

    growing, blocking, other = plan(add(2)), plan(feature(2)), plan(add(3), retries=1)
    assert len(set(digests(growing))) == 4, "both phases alike, each level for itself"
    assert len(set(digests(blocking))) == 2, "a block does not grow"
    assert digests(growing)[0] == digests(blocking)[0] == digests(other)[0], "what may follow a rewind runs only then"
    assert len({each.effective_digest(1, Phase.GENERATED) for each in (growing, blocking, other)}) == 3


HASH_VARIANTS = [
    (spec(guards=(guard(0, rewind=rewind(add(2))),)), ()),
    (spec(guards=(guard(0, rewind=rewind(add(2, 2.0))),)), ()),
    (spec(guards=(guard(0, rewind=rewind(add(2, 2.0000002))),)), ()),
    (spec(guards=(guard(0, rewind=rewind(feature(2))),)), ()),
    (spec(guards=(guard(0, rewind=rewind(feature(2), max_retries=3)),)), ()),
    (spec(guards=(guard(0, rewind=rewind(feature(2), num_tokens=5)),)), ()),
    (spec(guards=(guard(0, rewind=Rewind(4, (feature(2),), 2, otherwise=GuardAction.FLAG)),)), ()),
    (spec(guards=(guard(2, phase=Phase.PROMPT),)), ()),
    (spec(add(phase=Phase.PROMPT)), ()),
    (spec(add(), add(2, phase=Phase.GENERATED, gate=gate(3))), ()),
    (spec(add()), ("mood",)),
    (spec(), ("mood",)),
]
"""Told apart by the hash beside the distinct ones."""


def test_the_hash_covers_everything_that_can_run(packs) -> None:
    variants = [*DISTINCT.values(), *HASH_VARIANTS]
    hashes = [compile_plan(*variant, packs).hash for variant in variants]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [compile_plan(*variant, packs).hash for variant in variants]


def test_the_hash_covers_the_rows_themselves(catalog, sae) -> None:
    """Even of an SAE that was not loaded from disk and has no hash to go by."""
    changed = sae.W_dec.clone()
    changed[1, 3] *= 1.001
    bare, other = (replace(sae, sha256="", W_dec=weights) for weights in (sae.W_dec, changed))
    plans = [compile_plan(spec(add()), (), replace(catalog, saes={"toy-sae": each})) for each in (bare, other)]
    assert plans[0].hash != plans[1].hash
