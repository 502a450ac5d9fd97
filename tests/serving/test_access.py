"""Keys, tenants and quotas: who gets in, under which policies, and how much."""

from __future__ import annotations

import asyncio
import hmac
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerserve.errors import CapacityError, InvalidRequestError, PolicyError, ServiceError
from steerserve.serving import keys
from steerserve.serving.admission import Access
from steerserve.serving.keys import key_hash, new_key
from steerserve.serving.service import Caller, Exchange, Interface
from steerserve.types import (
    ConceptTarget,
    FinishReason,
    GenerateRequest,
    Guard,
    GuardAction,
    Intervention,
    Message,
    Op,
    SamplingParams,
    SteeringSpec,
    StepOutput,
)

LOADED = frozenset({"family", "family@2", "watch", "watch@1", "strict", "strict@1"})
KEY, ADMIN_KEY, OLD_KEY = new_key(), new_key(), new_key()
FILE = f"""
format: steerserve.access/1
tenants:
  chat:
    policies: {{required: [family], default: [watch], allowed: [watch, strict]}}
    quotas: {{requests_per_minute: 3, tokens_per_minute: 100, concurrent: 2}}
    may_steer: false
    first_priority: 5
  lab: {{}}
keys:
  - {{id: chat-1, tenant: chat, sha256: {key_hash(KEY)}}}
  - {{id: root, tenant: lab, roles: [admin], sha256: {key_hash(ADMIN_KEY)}, certificate: operator}}
  - {{id: old, tenant: lab, sha256: {key_hash(OLD_KEY)}, expires: 2026-01-01T00:00:00Z}}
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "access.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("access") / "access.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture
def access(file: Path, clock: Clock) -> Access:
    return make(file, clock)


def make(file: Path, clock: Clock) -> Access:
    return Access(file, lambda: LOADED, clock, lambda: datetime(2026, 6, 1, tzinfo=UTC))


def exchange(tenant: str = "chat", key: str = "", **request: object) -> Exchange:
    values = {"request_id": "a", "prompt": "x", "priority": 5, "sampling": SamplingParams(max_tokens=10)}
    asked = GenerateRequest(**{**values, **request})
    key_id = key or {"chat": "chat-1", "lab": "root"}[tenant]
    return Exchange(asked, Caller(tenant, key_id, frozenset({"user"})), Interface.GRPC)


def test_a_key_tells_its_tenant_and_roles(access: Access) -> None:
    caller = access.authenticate(f"Bearer {KEY}")
    assert (caller.tenant, caller.key_id, caller.roles) == ("chat", "chat-1", frozenset({"user"}))
    assert access.authenticate(f"bearer  {ADMIN_KEY}").key_id == "root"
    assert access.authenticate(None, ["somebody", "operator"]).key_id == "root"


@pytest.mark.parametrize("shown", [None, "", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY])
def test_what_is_not_a_key_is_refused_and_not_repeated(access: Access, shown: str | None) -> None:
    with pytest.raises(ServiceError, match="Bearer KEY") as raised:
        access.authenticate(shown)
    assert raised.value.code == "UNAUTHENTICATED"
    assert KEY[12:] not in str(raised.value)


def test_a_wrong_key_counts_before_a_right_certificate(access: Access) -> None:
    with pytest.raises(ServiceError):
        access.authenticate("Bearer wrong", ["operator"])


def test_an_expired_key_is_refused(access: Access) -> None:
    with pytest.raises(ServiceError, match="old has expired"):
        access.authenticate(f"Bearer {OLD_KEY}")


def test_every_key_is_compared_in_constant_time(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    access.authenticate(f"Bearer {KEY}")
    assert len(compared) == 3


def test_an_open_server_lets_everyone_do_everything(clock: Clock) -> None:
    open_server = Access(None, lambda: LOADED, clock)
    asked = exchange(policies=("strict",))
    assert open_server.admit(asked) is asked.request
    assert open_server.authenticate(None).roles == {"user", "admin"}


@pytest.mark.parametrize(
    ("asked", "admitted"),
    [
        ((), ("watch", "family")),
        (("strict",), ("strict", "family")),
        (("family@2", "strict@1"), ("strict@1", "family")),
        (("family@1",), ("family",)),  # the tenant's version stands
    ],
)
def test_policies_of_a_tenant(access: Access, asked: tuple[str, ...], admitted: tuple[str, ...]) -> None:
    assert access.admit(exchange(policies=asked)).policies == admitted


@settings(deadline=None)
@given(asked=st.lists(st.sampled_from([*sorted(LOADED), "family@1"]), max_size=4))
def test_no_request_gets_rid_of_a_required_policy(shared_file: Path, asked: list[str]) -> None:
    assert "family" in make(shared_file, Clock()).admit(exchange(policies=tuple(asked))).policies


def test_a_policy_that_a_tenant_may_not_name_is_refused(file: Path, clock: Clock) -> None:
    file.write_text(FILE.replace("allowed: [watch, strict]", "allowed: [watch]"))
    with pytest.raises(ServiceError, match=r"policies\[1\]: got 'strict', expected one that tenant chat may name") as e:
        make(file, clock).admit(exchange(policies=("watch", "strict")))
    assert e.value.code == "PERMISSION_DENIED"


def test_a_required_policy_that_is_gone_closes_the_door(file: Path, clock: Clock) -> None:
    loaded = set(LOADED)
    access = Access(file, lambda: frozenset(loaded), clock)
    loaded.discard("family")
    with pytest.raises(ServiceError, match="family, which tenant chat must have, is not in force") as raised:
        access.admit(exchange())
    assert raised.value.code == "UNAVAILABLE"


def test_a_tenant_that_may_not_steer_may_read(access: Access) -> None:
    concept = ConceptTarget("mood")
    reads = SteeringSpec((Intervention(concept, Op.MONITOR),), (Guard(concept, 0.0, GuardAction.FLAG),))
    assert access.admit(exchange(steering=reads)).steering is reads
    for edits in (
        SteeringSpec((Intervention(concept, Op.BLOCK),)),
        SteeringSpec(guards=(Guard(concept, 0.0, GuardAction.BLOCK),)),
    ):
        with pytest.raises(ServiceError, match="may not steer"):
            access.admit(exchange(steering=edits))


def test_nobody_gets_in_front(access: Access) -> None:
    assert [access.admit(exchange(priority=asked)).priority for asked in (-3, 9)] == [5, 9]


def test_tenants_share_no_cached_prefixes(access: Access) -> None:
    salts = {access.admit(exchange(tenant, cache_salt=salt)).cache_salt for tenant in ("chat", "lab") for salt in "ab"}
    assert len(salts) == 4


def test_reading_a_text_is_not_edited(access: Access) -> None:
    assert access.admit(exchange(sampling=SamplingParams(max_tokens=0))).policies == ()


def test_a_key_without_the_role_of_users_does_not_generate(access: Access) -> None:
    asked = Exchange(exchange().request, access.authenticate(f"Bearer {ADMIN_KEY}"), Interface.GRPC)
    with pytest.raises(ServiceError, match="root has not the role user"):
        access.admit(asked)


def finish(access: Access, asked: Exchange, num_generated: int, num_prompt: int) -> None:
    asyncio.run(access.admitted(asked))
    last = StepOutput("a", (1,) * num_generated, "", finish_reason=FinishReason.STOP, num_prompt_tokens=num_prompt)
    asyncio.run(access.produced(asked, last))
    asyncio.run(access.ended(asked, None))


def test_quotas_to_the_second(access: Access, clock: Clock) -> None:
    for _ in range(3):
        asked = exchange()
        access.admit(asked)
        finish(access, asked, 10, 10)
    with pytest.raises(CapacityError, match="out of requests") as raised:
        access.admit(exchange())
    assert raised.value.retry_after_s == pytest.approx(20.0)
    clock.now += 20.0
    access.admit(exchange())


def test_tokens_are_reserved_and_settled(access: Access, clock: Clock) -> None:
    asked = exchange(prompt=(1,) * 4, sampling=SamplingParams(max_tokens=43, n=2))
    access.admit(asked)
    with pytest.raises(CapacityError, match="out of tokens") as raised:
        access.admit(exchange(prompt=(1,), sampling=SamplingParams(max_tokens=15)))
    assert raised.value.retry_after_s == pytest.approx(6 * 0.6)
    finish(access, asked, 10, 4)
    access.admit(exchange(prompt=(1,), sampling=SamplingParams(max_tokens=80)))
    with pytest.raises(InvalidRequestError, match="at most 100 tokens, those tenant chat has in a minute"):
        access.admit(exchange(prompt=(1,), sampling=SamplingParams(max_tokens=100)))


def with_quotas_of_the_key(file: Path, quotas: str) -> None:
    own = f"sha256: {key_hash(KEY)}, quotas: {quotas}}}"
    second = f"  - {{id: chat-2, tenant: chat, sha256: {'a' * 64}}}"
    file.write_text(FILE.replace(f"sha256: {key_hash(KEY)}}}", own) + second)


def test_a_key_has_quotas_of_its_own_within_its_tenants(access: Access, file: Path, clock: Clock) -> None:
    with_quotas_of_the_key(file, "{requests_per_minute: 1}")
    access.reload()
    access.admit(exchange())
    with pytest.raises(CapacityError, match="key chat-1 is out of requests") as raised:
        access.admit(exchange())
    assert raised.value.retry_after_s == pytest.approx(60)
    access.admit(exchange(key="chat-2"))  # what was refused has cost the tenant nothing
    with pytest.raises(CapacityError, match="tenant chat has 2 requests in flight"):
        access.admit(exchange(key="chat-2"))


def test_the_time_to_wait_is_that_of_the_last_quota_with_room(access: Access, file: Path, clock: Clock) -> None:
    with_quotas_of_the_key(file, "{tokens_per_minute: 60}")
    access.reload()
    asked = exchange(prompt=(1,) * 20, sampling=SamplingParams(max_tokens=30))
    access.admit(asked)
    with pytest.raises(CapacityError, match="key chat-1 is out of tokens") as raised:
        access.admit(exchange(prompt=(1,) * 20, sampling=SamplingParams(max_tokens=40)))  # of the tenant's, 6 s
    assert raised.value.retry_after_s == pytest.approx(50)
    finish(access, asked, 0, 20)
    access.admit(exchange(prompt=(1,) * 20, sampling=SamplingParams(max_tokens=20)))
    with pytest.raises(InvalidRequestError, match="at most 60 tokens, those key chat-1 has in a minute"):
        access.admit(exchange(prompt=(1,) * 20, sampling=SamplingParams(max_tokens=41)))


def test_a_key_in_the_place_of_its_hash_is_not_repeated(access: Access, file: Path) -> None:
    file.write_text(FILE.replace(key_hash(KEY), KEY))
    with pytest.raises(PolicyError, match=r"access\.yaml:11: keys\[0\]\.sha256: expected 64 hexadecimal") as raised:
        access.reload()
    assert KEY[12:] not in str(raised.value)


@pytest.mark.parametrize("prompt", ["x" * 200, (1,) * 50, (Message("user", "x" * 200),)])
def test_hanging_up_does_not_make_a_prompt_free(access: Access, prompt: object) -> None:
    asked = exchange(prompt=prompt, sampling=SamplingParams(max_tokens=1))
    access.admit(asked)
    asyncio.run(access.admitted(asked))
    asyncio.run(access.ended(asked, asyncio.CancelledError()))
    with pytest.raises(CapacityError, match="out of tokens"):
        access.admit(exchange(prompt=prompt, sampling=SamplingParams(max_tokens=1)))


def test_what_the_engine_refuses_costs_no_tokens(access: Access) -> None:
    asked = exchange(prompt=(1,) * 90)
    access.admit(asked)
    asyncio.run(access.ended(asked, InvalidRequestError("prompt", "x", "y")))
    access.admit(exchange(prompt=(1,) * 90))


def test_no_more_in_flight_than_allowed_and_a_refusal_takes_nothing(access: Access) -> None:
    first, second, third = exchange(), exchange(), exchange()
    access.admit(first)
    access.admit(second)
    with pytest.raises(CapacityError, match="2 requests in flight"):
        access.admit(third)
    asyncio.run(access.ended(third, CapacityError("")))
    asyncio.run(access.ended(first, None))
    access.admit(third)


def test_a_bad_file_leaves_the_old_one_in_force(access: Access, file: Path) -> None:
    file.write_text(FILE.replace("tenant: chat,", "tenant: nobody,"))
    with pytest.raises(
        PolicyError, match=r"keys\[0\]\.tenant: got 'nobody', expected a tenant of this file: chat, lab"
    ):
        access.reload()
    assert access.authenticate(f"Bearer {KEY}").tenant == "chat"
    file.write_text(FILE.replace("required: [family]", "required: [famly]"))
    with pytest.raises(PolicyError, match=r"tenants\.chat\.policies\.required: got 'famly'"):
        access.reload()


def test_what_was_used_still_counts_after_a_reload(access: Access, file: Path) -> None:
    for _ in range(3):
        asked = exchange()
        access.admit(asked)
        finish(access, asked, 1, 1)
    file.write_text(FILE.replace("requests_per_minute: 3", "requests_per_minute: 6"))
    access.reload()
    with pytest.raises(CapacityError, match="out of requests"):
        access.admit(exchange())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("sha256: " + key_hash(KEY), "sha256: abc"), r"access\.yaml:11: keys\[0\]\.sha256"),
        (("may_steer: false", "may_ster: false"), r"access\.yaml:7: tenants\.chat\.may_ster: unknown"),
        (("id: root", "id: chat-1"), r"keys\[1\]\.id: 'chat-1' is another key's"),
        (("2026-01-01T00:00:00Z", "2026-01-01"), r"expires: got .*, expected an offset from UTC too"),
        (("  lab: {}", "  chat: {}"), "given twice"),
    ],
)
def test_what_is_wrong_with_a_file(file: Path, clock: Clock, change: tuple[str, str], problem: str) -> None:
    file.write_text(FILE.replace(*change))
    with pytest.raises(PolicyError, match=problem):
        make(file, clock)


def test_a_changed_file_is_read_again(access: Access, file: Path) -> None:
    async def change() -> None:
        watch = asyncio.create_task(access.watch(0.01))
        await asyncio.sleep(0.03)
        file.write_text("not even: [yaml")
        await asyncio.sleep(0.05)
        assert access.authenticate(f"Bearer {KEY}").tenant == "chat"
        file.write_text(FILE.replace("id: chat-1", "id: chat-9"))
        for _ in range(500):
            await asyncio.sleep(0.01)
            if access.authenticate(f"Bearer {KEY}").key_id == "chat-9":
                break
        watch.cancel()

    asyncio.run(change())
    assert access.authenticate(f"Bearer {KEY}").key_id == "chat-9"
