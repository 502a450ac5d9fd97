"""What the soak's clients do to a server, and what each of them must get for it.

Every request that is sent is entered in a ledger and must end in a reply with its receipt or in a status that its kind
allows, within a time that nobody would wait longer than. The rest is the server's to bear: clients that cancel, read
slowly or not at all, speak half a protocol, send what is no protobuf, and come in floods.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx2

from steerserve.v1 import generation_pb2 as pb
from steerserve.v1 import generation_pb2_grpc, score_pb2

PATIENCE_S = 60.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_HTTP_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: soak\r\nContent-Length: 100\r\n\r\n{"
_NUM_SILENT = 32
_METHOD = "/steerserve.v1.GenerationService/Generate"
_WORDS = ("sea", "ship", "night", "captain", "storm")
_BUSY = {"RESOURCE_EXHAUSTED"}
_FAULT = {"INTERNAL"}  # a fault was injected into the batch
_INVALID = (
    ("sampling.temperature", -1.0),
    ("sampling.top_p", 3.0),
    ("sampling.max_tokens", 2_000_000_000),
    ("sampling.n", 1_000),
    ("request_id", "x" * 1_000),
    ("text", ""),
)


@dataclass
class Ledger:
    """How requests ended.

    Attributes:
        ends: by kind of client and status.
        receipts: ids of requests that were answered with a receipt for each response.
        problems: what must not happen.
    """

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    receipts: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def enter(self, kind: str, code: str, allowed: set[str], detail: str = "") -> None:
        self.ends[kind, code] += 1
        if code not in allowed:
            self.problems.append(f"{kind} ended in {code}, expected one of {sorted(allowed)}: {detail}")

    def enter_replies(self, kind: str, request_id: str, finish_infos: list[pb.FinishInfo], expected: int) -> None:
        """A reply, which needs a receipt for each of its responses."""
        complete = len(finish_infos) == expected and all(
            info.HasField("receipt") and info.receipt.model_fingerprint for info in finish_infos
        )
        if complete:
            self.receipts.add(request_id)
        self.enter(kind, "OK" if complete else "NO_RECEIPT", {"OK"}, request_id)


class Load:
    """The clients; each method is one of a kind, and returns when its request has ended.

    Args:
        http_address: of the OpenAI interface.
        policies: that requests may name.
    """

    def __init__(self, address: str, http_address: str, policies: tuple[str, ...], seed: int) -> None:
        self.ledger = Ledger()
        self.is_draining = False
        self._address, self._http_address = address, http_address
        self._policies = policies
        self._random = random.Random(seed)
        self._serial = 0
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._silent: deque[asyncio.WriteTransport] = deque()
        self._http = httpx2.AsyncClient(base_url=f"http://{http_address}", timeout=PATIENCE_S)
        self.kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.unary: 8, self.stream: 8, self.cancelled: 4, self.late: 3, self.invalid: 3, self.malformed: 3,
            self.slow_reader: 2, self.deaf: 2, self.half_open: 2, self.silent: 1, self.flood: 1,
            self.score: 4, self.over_http: 3, self.http_hang_up: 2,
        }  # fmt: skip

    async def run(self, num_clients: int, seconds: float) -> None:
        """``num_clients`` at a time, of kinds drawn at random."""
        deadline = asyncio.get_running_loop().time() + seconds

        async def client() -> None:
            while asyncio.get_running_loop().time() < deadline:
                (kind,) = self._random.choices(list(self.kinds), list(self.kinds.values()))
                await self.within_patience(kind)

        await asyncio.gather(*(client() for _ in range(num_clients)))

    async def within_patience(self, kind: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await kind()
        except TimeoutError:
            self.ledger.enter(kind.__name__, "NO_END", set(), f"nothing within {PATIENCE_S:g} s")
        except httpx2.TransportError as error:
            allowed = {type(error).__name__} if self.is_draining else set()
            self.ledger.enter(kind.__name__, type(error).__name__, allowed, str(error))

    async def load_of_server(self) -> int:
        """Responses that run or wait."""
        info = await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S)
        return int(info.num_requests_running + info.num_requests_waiting)

    async def policies_in_force(self) -> list[str]:
        info = await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE_S)
        return list(info.policies)

    async def close(self) -> None:
        for transport in self._silent:
            transport.abort()
        await self._channel.close()
        await self._http.aclose()

    # The kinds.

    async def unary(self) -> None:
        await self._ask("unary", self._request())

    async def flood(self) -> None:
        requests = [self._request(max_tokens=2, n=1) for _ in range(40)]
        await asyncio.gather(*(self._ask("flood", request) for request in requests))

    async def stream(self) -> None:
        await self._read("stream", self._request(pb.GenerateStreamRequest))

    async def slow_reader(self) -> None:
        await self._read("slow reader", self._request(pb.GenerateStreamRequest, max_tokens=40), pause_s=0.05)

    async def score(self) -> None:
        text = " ".join(self._random.choice(_WORDS) for _ in range(self._random.randrange(1, 200)))
        request = score_pb2.ScoreRequest(text=text, policies=self._policies)
        try:
            reply = await self._stub.Score(request, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            self.ledger.enter("score", error.code().name, self._allowed(), error.details() or "")
        else:
            complete = reply.receipts and all(receipt.model_fingerprint for receipt in reply.receipts)
            self.ledger.enter("score", "OK" if complete else "NO_RECEIPT", {"OK"})

    async def late(self) -> None:
        request = self._request(max_tokens=400)
        await self._ask("late", request, timeout=self._random.uniform(0.001, 0.3), also={"DEADLINE_EXCEEDED"})

    async def cancelled(self) -> None:
        call = self._stub.GenerateStream(self._request(pb.GenerateStreamRequest, max_tokens=400))
        try:
            for _ in range(self._random.randrange(4)):
                if await call.read() is grpc.aio.EOF:
                    break
        except grpc.aio.AioRpcError as error:
            self.ledger.enter("cancelled", error.code().name, self._allowed())
        else:
            call.cancel()
            self.ledger.enter("cancelled", "CANCELLED", {"CANCELLED"})

    async def deaf(self) -> None:
        """Asks for much and reads nothing, on a connection of its own with a small window; then goes away."""
        options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.GenerateStream(self._request(pb.GenerateStreamRequest, max_tokens=400))
            await asyncio.sleep(self._random.uniform(0.1, 1.0))
            call.cancel()
            self.ledger.enter("deaf", "CANCELLED", {"CANCELLED"})

    async def invalid(self) -> None:
        path, value = self._random.choice(_INVALID)
        request = self._request()
        holder: Any = request
        *parents, name = path.split(".")
        for parent in parents:
            holder = getattr(holder, parent)
        setattr(holder, name, value)
        await self._ask("invalid", request, only={"INVALID_ARGUMENT"} | self._unavailable())

    async def malformed(self) -> None:
        """Bytes that are no message, or the beginning of one."""
        whole = self._request().SerializeToString()
        data = self._random.choice((self._random.randbytes(64), whole[: self._random.randrange(1, len(whole))]))
        call = self._channel.unary_unary(_METHOD)(data, timeout=PATIENCE_S)
        detail = ""
        try:
            await call
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code, detail = error.code().name, error.details() or ""
        # A truncated message can be a whole one of fewer fields, which then meets a fault like any other.
        faults = _FAULT if "the engine failed" in detail else set()
        allowed = self._allowed() - _FAULT | {"OK", "INVALID_ARGUMENT"} | faults
        self.ledger.enter("malformed", code, allowed, detail)

    async def half_open(self) -> None:
        """The beginning of a connection, and then a reset."""
        host, _, port = self._address.rpartition(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(_PREFACE[: self._random.randrange(1, len(_PREFACE) + 1)])
            await asyncio.sleep(self._random.uniform(0.0, 1.0))
            writer.transport.abort()
        except OSError as error:
            self.ledger.enter("half open", type(error).__name__, {"ConnectionResetError", "BrokenPipeError"})
        else:
            self.ledger.enter("half open", "CLOSED", {"CLOSED"})

    async def silent(self) -> None:
        """The beginning of a connection, and then nothing for as long as others are not as silent."""
        address, data = self._random.choice(((self._address, _PREFACE), (self._http_address, _HTTP_HEAD)))
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, host, int(port))
        transport.write(data[: self._random.randrange(len(data) + 1)])
        self._silent.append(transport)
        if len(self._silent) > _NUM_SILENT:
            self._silent.popleft().abort()
        self.ledger.enter("silent", "LEFT_OPEN", {"LEFT_OPEN"})

    async def over_http(self) -> None:
        body = {"prompt": "Once upon a time", "max_tokens": self._random.randrange(1, 20)}
        response = await self._http.post("/v1/completions", json=body)
        allowed = {"200", "429", "500"} | ({"503"} if self.is_draining else set())
        self.ledger.enter("HTTP", str(response.status_code), allowed, response.text[:200])

    async def http_hang_up(self) -> None:
        body = {"prompt": "Once upon a time", "max_tokens": 300, "stream": True}
        async with (
            self._http.stream("POST", "/v1/completions", json=body) as response,
            aclosing(response.aiter_lines()) as lines,
        ):
            async for _ in lines:
                break
        self.ledger.enter("HTTP hang-up", str(response.status_code), {"200", "429", "500"})

    # How they ask.

    def _request(self, kind: type = pb.GenerateRequest, max_tokens: int | None = None, n: int | None = None) -> Any:
        self._serial += 1
        chosen = self._random
        words = " ".join(chosen.choice(_WORDS) for _ in range(chosen.randrange(30)))
        request = kind(request_id=f"soak-{self._serial}", text=f"Once {words}")
        request.sampling.max_tokens = max_tokens or chosen.randrange(1, 30)
        request.sampling.n = n or chosen.choice((1, 1, 1, 3))
        request.sampling.ignore_eos = True
        request.policies.extend(chosen.choice(((), self._policies)))
        return request

    async def _ask(
        self,
        kind: str,
        request: pb.GenerateRequest,
        timeout: float = PATIENCE_S,
        also: frozenset[str] | set[str] = frozenset(),
        only: set[str] | None = None,
    ) -> None:
        try:
            reply = await self._stub.Generate(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            self.ledger.enter(kind, error.code().name, only or self._allowed() | also, error.details() or "")
        else:
            infos = [completion.finish_info for completion in reply.completions]
            self.ledger.enter_replies(kind, request.request_id, infos, request.sampling.n)

    async def _read(self, kind: str, request: pb.GenerateStreamRequest, pause_s: float = 0.0) -> None:
        infos: list[pb.FinishInfo] = []
        try:
            async for piece in self._stub.GenerateStream(request, timeout=PATIENCE_S):
                if piece.HasField("finish_info"):
                    infos.append(piece.finish_info)
                await asyncio.sleep(pause_s)
        except grpc.aio.AioRpcError as error:
            self.ledger.enter(kind, error.code().name, self._allowed(), error.details() or "")
        else:
            self.ledger.enter_replies(kind, request.request_id, infos, request.sampling.n)

    def _allowed(self) -> set[str]:
        return _BUSY | _FAULT | self._unavailable()

    def _unavailable(self) -> set[str]:
        return {"UNAVAILABLE"} if self.is_draining else set()
