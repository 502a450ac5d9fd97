"""The log: one line of text or JSON for each event, whichever library it comes from.

Everything goes through the standard library's ``logging``; structlog gives it its form. A line that was written for a
request carries its ``request_id``. No text of a prompt or a response, no key and no value of a refused field is
logged.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.contextvars import bind_contextvars, merge_contextvars
from structlog.typing import Processor
from transformers.utils import logging as transformers_logging

from steerserve.config import TelemetryConfig
from steerserve.errors import FieldError
from steerserve.serving.service import Exchange
from steerserve.serving.telemetry import Passage, code_of, policy_verdicts
from steerserve.types import StepOutput

_access = logging.getLogger("steerserve.access")


def configure_logs(config: TelemetryConfig) -> None:
    """Send every library's log to standard error; for the process that serves, once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(is_json=config.log_format == "json"))
    logging.basicConfig(level=config.log_level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()


class RequestIds:
    """The ``Observer`` that binds a request's id to what is logged in its task."""

    async def admitted(self, exchange: Exchange) -> None:
        bind_contextvars(request_id=exchange.request.request_id)

    async def produced(self, exchange: Exchange, output: StepOutput) -> None:
        pass

    async def ended(self, exchange: Exchange, error: BaseException | None) -> None:
        # Stays bound: the interface may have something to say of the error. The task ends with its request.
        bind_contextvars(request_id=exchange.request.request_id)


def log_access(passage: Passage, error: BaseException | None) -> None:
    """One line for an exchange that ended."""
    exchange = passage.exchange
    entry: dict[str, object] = {
        "request_id": exchange.request.request_id,
        "interface": str(exchange.interface),
        "tenant": exchange.caller.tenant,
        "key_id": exchange.caller.key_id,
        # Of a refused request they are whatever its caller wrote.
        "policies": list(exchange.request.policies) if passage.is_admitted else [],
        "code": code_of(error),
        "duration_s": round(passage.seconds, 4),
        "first_token_s": None if passage.first_token_s is None else round(passage.first_token_s, 4),
        "prompt_tokens": passage.num_prompt_tokens,
        "generated_tokens": passage.num_generated_tokens,
        "finish_reasons": [str(output.finish_reason) for output in passage.last_outputs],
        "verdicts": [
            f"{policy}: {verdict}" for output in passage.last_outputs for policy, verdict in policy_verdicts(output)
        ],
    }
    if isinstance(error, FieldError):
        entry["field"] = error.field  # its value may be the prompt
    _access.info("request", extra=entry)


def _formatter(is_json: bool) -> logging.Formatter:
    shared: list[Processor] = [
        merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks without the values of local variables: prompts are among them.
    if is_json:
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        last: list[Processor] = [
            structlog.processors.ExceptionRenderer(tracebacks),
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ]
    else:
        # Quoted: a caller's request id must not look like another line of the log.
        last = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                exception_formatter=structlog.dev.plain_traceback,
                repr_native_str=True,
            )
        ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )
