"""The routes: read, call the service, answer. Nothing that decides about a request happens here."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Generic, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from steerserve.errors import SteerserveError
from steerserve.serving.http.answers import Answer, ChatAnswer, CompletionAnswer, Vocabulary
from steerserve.serving.http.backend import Backend
from steerserve.serving.http.bodies import Body, ChatBody, CompletionBody, parse_body
from steerserve.serving.http.connection import EventWriter, read_json_body, unless_disconnected
from steerserve.serving.http.errors import HttpError, error_answer
from steerserve.serving.http.moderation import Moderation
from steerserve.serving.http.requests import Asked, chat_request, completion_request, fields_renamed
from steerserve.serving.service import Caller, Interface
from steerserve.types import StepOutput

BodyT = TypeVar("BodyT", bound=Body)


def openai_app(backend: Backend) -> Starlette:
    """The ASGI application."""
    default = backend.default_max_tokens
    chat = Generation(backend, "chatcmpl", ChatBody, lambda body, id_: chat_request(body, id_, default), ChatAnswer)
    completion = Generation(backend, "cmpl", CompletionBody, completion_request, CompletionAnswer)
    models = Models(backend)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/moderations", Moderation(backend).answer, methods=["POST"]),
            Route("/v1/models", models.all),
            Route("/v1/models/{name:path}", models.one),
            Route("/healthz", lambda request: _probe(backend.health.is_alive)),
            Route("/readyz", lambda request: _probe(backend.health.is_ready)),
        ],
        exception_handlers={SteerserveError: _refused, Exception: _refused, HTTPException: _refused_by_route},
    )


class Generation(Generic[BodyT]):
    """One endpoint that generates, as an ASGI application.

    Args:
        prefix: what its ids begin with.
        read: from a body and the id of its answer to requests.
    """

    def __init__(
        self,
        backend: Backend,
        prefix: str,
        body_type: type[BodyT],
        read: Callable[[BodyT, str], Asked],
        answer_type: type[Answer],
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._body_type = body_type
        self._read = read
        self._answer_type = answer_type
        tokenizer = backend.service.engine_loop.engine.model.tokenizer
        self._vocabulary = Vocabulary(lambda token_ids: str(tokenizer.decode(token_ids)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer_id = f"{self._prefix}-{uuid.uuid4().hex}"
        headers = {"x-request-id": answer_id}
        stream = EventWriter(send, headers, self._backend.write_timeout_s)
        try:
            response = await self._respond(request, answer_id, stream)
        except ClientDisconnect:
            return
        except Exception as error:
            refusal = error_answer(error)
            if stream.has_begun:
                await stream.end_with(refusal.body)
                return
            response = JSONResponse(refusal.body, refusal.status, refusal.headers)
        if response is not None:
            response.headers.update(headers)
            await response(scope, receive, send)

    async def _respond(self, request: Request, answer_id: str, stream: EventWriter) -> Response | None:
        """The whole answer; None if it was streamed."""
        caller = self._backend.authenticate(request)
        content = await read_json_body(request, self._backend.max_body_bytes, self._backend.read_timeout_s)
        body = parse_body(self._body_type, content)
        self._backend.check_model(body.model)
        asked = self._read(body, answer_id)
        return await unless_disconnected(request.receive, self._generate(body, asked, caller, answer_id, stream))

    async def _generate(
        self, body: BodyT, asked: Asked, caller: Caller, answer_id: str, stream: EventWriter
    ) -> Response | None:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        model = self._backend.service.engine_loop.engine.model
        answer = self._answer_type(
            answer_id,
            model.name,
            f"fp_{model.fingerprint[:12]}",
            self._vocabulary,
            asked.requests[0].sampling.n,
            with_usage,
        )
        async with AsyncExitStack() as admitted:
            responses = []
            for index, request in enumerate(asked.requests):
                with fields_renamed(asked.rename, index):
                    opened = self._backend.service.generate(request, caller, Interface.HTTP)
                    responses.append(await admitted.enter_async_context(opened))
            outputs = await admitted.enter_async_context(aclosing(_merged(responses)))
            if not body.stream:
                whole: list[list[StepOutput]] = [[] for _ in responses]
                async for index, output in outputs:
                    whole[index].append(output)
                return JSONResponse(answer.whole(whole))
            async for index, output in outputs:
                chunk = answer.chunk(index, output)
                if chunk is not None:
                    await stream.write(chunk)
        if with_usage:
            await stream.write(answer.usage_chunk())
        await stream.write("[DONE]")
        await stream.close()
        return None


class Models:
    """Lists the one model."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._model = {
            "id": backend.model_name, "object": "model", "created": int(time.time()), "owned_by": "steerserve",
        }  # fmt: skip

    async def all(self, request: Request) -> Response:
        self._backend.authenticate(request)
        return JSONResponse({"object": "list", "data": [self._model]})

    async def one(self, request: Request) -> Response:
        self._backend.authenticate(request)
        name = request.path_params["name"]
        if name != self._backend.model_name:
            raise HttpError(
                404, "model_not_found", f"model: got {name!r}, expected {self._backend.model_name!r}", "model"
            )
        return JSONResponse(self._model)


def _probe(is_good: bool) -> Response:
    return JSONResponse({"status": "serving"}) if is_good else JSONResponse({"status": "not serving"}, 503)


async def _refused(request: Request, error: Exception) -> Response:
    refusal = error_answer(error)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _refused_by_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    response = await _refused(request, HttpError(error.status_code, "no_such_endpoint", message))
    response.headers.update(error.headers or {})
    return response


async def _merged(responses: Sequence[AsyncIterator[StepOutput]]) -> AsyncGenerator[tuple[int, StepOutput], None]:
    """The outputs of all ``responses`` as they come, each with its response's place."""
    if len(responses) == 1:
        async for output in responses[0]:
            yield 0, output
        return
    next_of = {asyncio.ensure_future(anext(response)): index for index, response in enumerate(responses)}
    try:
        while next_of:
            done, _ = await asyncio.wait(next_of, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = next_of.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                yield index, output
                next_of[asyncio.ensure_future(anext(responses[index]))] = index
    finally:
        for task in next_of:
            task.cancel()
        await asyncio.gather(*next_of, return_exceptions=True)
