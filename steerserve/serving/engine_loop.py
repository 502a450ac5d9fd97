"""The engine in a thread of its own, its outputs in one asyncio queue per request.

Three kinds of threads meet here. The *event loop* owns ``_queues``. The *engine thread* calls
``step`` and posts what it returns to the event loop. One *admission thread* validates and compiles
requests, and aborts them, strictly in order, so that an abort never overtakes the request it ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import replace

from steerserve.engine.engine import Engine
from steerserve.errors import InvalidRequestError, ServiceError
from steerserve.types import GenerateRequest, StepOutput

_log = logging.getLogger(__name__)

_Item = StepOutput | Exception
_SHUTTING_DOWN = "the server is shutting down"
_STOPPED_EARLY = "the server stopped before the response was complete"
_LAST_STEP_S = 5.0
"""For the step that runs when the engine is stopped; one that hangs is left behind."""
_in_dialogue: ContextVar[bool] = ContextVar("in_dialogue", default=False)


class EngineLoop:
    """Runs ``engine``; every request that was opened ends with a last output or an exception.

    Args:
        on_broken: called in the event loop, once, when the engine has failed and cannot go on.
    """

    def __init__(self, engine: Engine, on_broken: Callable[[], Awaitable[None]]) -> None:
        self.engine = engine
        self._on_broken = on_broken
        self._queues: dict[str, asyncio.Queue[_Item]] = {}
        self._open_ids: set[str] = set()
        self._serial = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_dialogues = 0
        self._refusal: str | None = None
        self._finishes_dialogues = False
        self._admission = ThreadPoolExecutor(max_workers=1, thread_name_prefix="admission")
        self._admitting = threading.Lock()  # holds up admission while a failed step is undone
        self._admitted: dict[str, int] = {}  # what the engine holds: the responses of each that have not ended
        self._work = threading.Event()
        self._stopping = False
        self._step_began: float | None = None
        self._event_loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[AsyncIterator[StepOutput]]:
        """Admit ``request`` and yield its outputs; leaving the context early aborts it and frees its slot.

        Raises:
            InvalidRequestError, IncompatibleError, CapacityError: the engine refuses the request.
            ServiceError: the server is draining or out of order.
        """
        if self._refusal is not None and not (self._finishes_dialogues and _in_dialogue.get()):
            raise ServiceError("UNAVAILABLE", self._refusal)
        if request.request_id in self._open_ids:
            raise InvalidRequestError("request_id", request.request_id, "an id that no request in flight has")
        self._open_ids.add(request.request_id)
        self._idle.clear()
        # A name of its own for each: the last output of an aborted request must not reach the next user of its id.
        engine_id = f"{request.request_id}#{next(self._serial)}"
        queue = self._queues[engine_id] = asyncio.Queue()
        is_admitted = False
        try:
            await self._event_loop.run_in_executor(self._admission, self._admit, replace(request, request_id=engine_id))
            is_admitted = True
            yield _outputs(queue, request)
        finally:
            del self._queues[engine_id]
            self._open_ids.remove(request.request_id)
            self._note_idle()
            # Harmless after the last output, needed on every other way out.
            if is_admitted:
                self._abort(engine_id)
            elif not self._stopping:
                self._admission.submit(self._abort, engine_id)

    @contextmanager
    def dialogue(self) -> Iterator[None]:
        """What the current task opens inside belongs together: a drain waits for all of it, and takes the rest of it.

        Raises:
            ServiceError: the server is draining or out of order.
        """
        if self._refusal is not None:
            raise ServiceError("UNAVAILABLE", self._refusal)
        self._num_dialogues += 1
        self._idle.clear()
        token = _in_dialogue.set(True)
        try:
            yield
        finally:
            _in_dialogue.reset(token)
            self._num_dialogues -= 1
            self._note_idle()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and give the open ones ``timeout_s`` to finish; the rest end with ServiceError."""
        self._refusal, self._finishes_dialogues = _SHUTTING_DOWN, True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            self._fail(self._queues, ServiceError("UNAVAILABLE", _STOPPED_EARLY))
        self._finishes_dialogues = False

    async def stop(self) -> None:
        """End both threads; requests still open end with ServiceError."""
        self._refusal = _SHUTTING_DOWN
        self._fail(self._queues, ServiceError("UNAVAILABLE", _STOPPED_EARLY))
        self._stopping = True
        self._work.set()
        await asyncio.to_thread(self._thread.join, _LAST_STEP_S)
        if self._thread.is_alive():
            _log.critical("a step of the engine has run for %.0f s and is left behind", self.seconds_in_step())
        self._admission.shutdown(wait=False)

    def seconds_in_step(self) -> float:
        """How long the step that runs has been running; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def _note_idle(self) -> None:
        if not self._queues and not self._num_dialogues:
            self._idle.set()

    def _admit(self, request: GenerateRequest) -> None:
        with self._admitting:
            self._admitted[request.request_id] = request.sampling.n  # before it can end
            try:
                self.engine.add_request(request)
            except BaseException:
                del self._admitted[request.request_id]
                raise
        self._work.set()

    def _abort(self, request_id: str) -> None:
        self.engine.abort(request_id)
        self._work.set()

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception:
            _log.critical("the engine cannot drop what it failed on and is given up", exc_info=True)
        if not self._stopping:
            asyncio.run_coroutine_threadsafe(self._give_up(), self._event_loop)

    def _step_until_stopped(self) -> None:
        while not self._stopping:
            if not self.engine.has_unfinished():
                self._work.wait()
                self._work.clear()
                continue
            self._step_began = time.monotonic()
            try:
                outputs = self.engine.step()
            except Exception:
                _log.exception("engine.step failed; every request in flight is ended")
                self._drop_everything()
            else:
                self._event_loop.call_soon_threadsafe(self._deliver, outputs)
                self._forget_ended(outputs)
            self._step_began = None

    def _forget_ended(self, outputs: Iterable[StepOutput]) -> None:
        for output in outputs:
            if _is_last(output):
                self._admitted[output.request_id] -= 1
                if self._admitted[output.request_id] == 0:
                    del self._admitted[output.request_id]

    def _drop_everything(self) -> None:
        """Any request may have made the step fail: end them all, and see that a step without them succeeds."""
        with self._admitting:
            failed = list(self._admitted)
            for engine_id in failed:
                self.engine.abort(engine_id)
            self._admitted.clear()
            self.engine.step()
        error = ServiceError("INTERNAL", "the engine failed on a batch that held this request")
        self._event_loop.call_soon_threadsafe(self._fail, failed, error)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            queue = self._queues.get(output.request_id)
            if queue is not None:
                queue.put_nowait(output if output.error is None else output.error)

    def _fail(self, engine_ids: Iterable[str], error: Exception) -> None:
        for engine_id in engine_ids:
            queue = self._queues.get(engine_id)
            if queue is not None:
                queue.put_nowait(error)

    async def _give_up(self) -> None:
        self._refusal = "the engine is out of order"
        self._fail(self._queues, ServiceError("UNAVAILABLE", self._refusal))
        await self._on_broken()


async def _outputs(queue: asyncio.Queue[_Item], request: GenerateRequest) -> AsyncIterator[StepOutput]:
    """Until every response of ``request`` has ended, or one of them with an error."""
    num_unfinished = request.sampling.n
    while num_unfinished:
        item = await queue.get()
        if isinstance(item, Exception):
            raise item
        num_unfinished -= _is_last(item)
        yield replace(item, request_id=request.request_id)


def _is_last(output: StepOutput) -> bool:
    return output.finish_reason is not None or output.error is not None
