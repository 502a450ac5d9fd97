"""Token buckets: how much a tenant, or one key of it, may still ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steerserve.errors import CapacityError, InvalidRequestError
from steerserve.serving.access import Quotas
from steerserve.types import GenerateRequest, Message

MINUTE_S = 60.0
BYTES_PER_TOKEN = 4


class Bucket:
    """Holds ``per_minute`` at most and fills at that rate; what is used beyond what was reserved is a debt."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount``, at most ``per_minute``, can be taken; 0 now."""
        self._fill(now)
        return max(0.0, (amount - self._level) * MINUTE_S / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Take it, or with a negative ``amount`` give it back."""
        self._fill(now)
        self._level = min(self._level - amount, float(self.per_minute))

    def resized(self, per_minute: int, now: float) -> Bucket:
        """Another size with the same share in it."""
        self._fill(now)
        bucket = Bucket(per_minute, now)
        bucket._level = self._level * per_minute / self.per_minute
        return bucket

    def _fill(self, now: float) -> None:
        gained = (now - self._at) * self.per_minute / MINUTE_S
        self._level, self._at = min(self._level + gained, float(self.per_minute)), now


@dataclass
class Reservation:
    """What one request holds of the quotas of its tenant and its key.

    Attributes:
        usages: whose quotas these are.
        prompt: tokens that the prompt is taken to have, until they are counted.
        responses: the most its responses can have.
        generated: tokens of responses so far.
        is_admitted: the engine took it; otherwise it costs nothing but its place among the requests.
    """

    usages: tuple[Usage, ...]
    prompt: int
    responses: int
    generated: int = 0
    is_admitted: bool = False

    @property
    def tokens(self) -> int:
        """What was reserved."""
        return self.prompt + self.responses

    @property
    def used(self) -> int:
        """What it is charged."""
        return self.prompt + self.generated if self.is_admitted else 0

    def count_prompt(self, num_tokens: int) -> None:
        """The prompt's tokens are known now."""
        for usage in self.usages:
            usage.take(num_tokens - self.prompt)
        self.prompt = num_tokens

    def settle(self) -> None:
        """The request has ended: give back what it reserved and did not use."""
        for usage in self.usages:
            usage.take(self.used - self.tokens)
            usage.end()


class Usage:
    """The buckets and the requests in flight of one owner, a tenant or a key, as errors call it."""

    def __init__(self, owner: str, quotas: Quotas, clock: Callable[[], float]) -> None:
        self._owner = owner
        self._clock = clock
        self._quotas = Quotas()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._num_in_flight = 0
        self.change(quotas)

    def change(self, quotas: Quotas) -> None:
        """Put other quotas in force; what was used of the old ones still counts."""
        now = self._clock()
        self._requests = _changed(self._requests, quotas.requests_per_minute, now)
        self._tokens = _changed(self._tokens, quotas.tokens_per_minute, now)
        self._quotas = quotas

    def refusal(self, num_tokens: int) -> CapacityError | None:
        """Why a request of so many tokens must wait, and for how long.

        Raises:
            InvalidRequestError: it would wait forever: more tokens than a minute has.
        """
        now, most = self._clock(), self._quotas.concurrent
        if self._tokens is not None and num_tokens > self._tokens.per_minute:
            expected = f"at most {self._tokens.per_minute} tokens, those {self._owner} has in a minute"
            raise InvalidRequestError("sampling.max_tokens", f"{num_tokens} tokens with the prompt", expected)
        waits = {
            "requests": self._requests.wait_s(1, now) if self._requests else 0.0,
            "tokens": self._tokens.wait_s(num_tokens, now) if self._tokens else 0.0,
        }
        kind = max(waits, key=lambda name: waits[name])
        if waits[kind] > 0:
            return CapacityError(f"{self._owner} is out of {kind} for now", retry_after_s=waits[kind])
        if most is not None and self._num_in_flight >= most:
            return CapacityError(f"{self._owner} has {self._num_in_flight} requests in flight, expected at most {most}")
        return None

    def begin(self, num_tokens: int) -> None:
        """Take a request with so many tokens."""
        if self._requests is not None:
            self._requests.take(1, self._clock())
        self.take(num_tokens)
        self._num_in_flight += 1

    def take(self, num_tokens: int) -> None:
        """Take tokens, or with a negative number give them back."""
        if self._tokens is not None:
            self._tokens.take(num_tokens, self._clock())

    def end(self) -> None:
        """A request is over."""
        self._num_in_flight -= 1


def reserve(usages: Sequence[Usage], request: GenerateRequest) -> Reservation:
    """Take a request, its prompt and the most tokens its responses can have out of all the quotas, or out of none.

    Raises:
        CapacityError: not now; says when all of them have room.
        InvalidRequestError: never.
    """
    num_responses = request.sampling.max_tokens * request.sampling.n
    reservation = Reservation(tuple(usages), _prompt_tokens(request), num_responses)
    refusals = [refusal for usage in usages if (refusal := usage.refusal(reservation.tokens)) is not None]
    if refusals:
        raise max(refusals, key=lambda refusal: refusal.retry_after_s)
    for usage in usages:
        usage.begin(reservation.tokens)
    return reservation


def _prompt_tokens(request: GenerateRequest) -> int:
    """Ids are counted; of text it is an estimate, in force until the engine has counted."""
    match request.prompt:
        case str(text):
            return 1 + len(text.encode(errors="replace")) // BYTES_PER_TOKEN
        case prompt:
            return sum(
                1 + len(part.content.encode(errors="replace")) // BYTES_PER_TOKEN if isinstance(part, Message) else 1
                for part in prompt
            )


def _changed(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    return Bucket(per_minute, now) if bucket is None else bucket.resized(per_minute, now)
