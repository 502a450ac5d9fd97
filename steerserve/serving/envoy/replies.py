"""The messages that answer Envoy, in the form that the mode of the body asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.type.v3 import http_status_pb2
from google.protobuf.struct_pb2 import Struct

from steerserve.serving.envoy.bodies import dump
from steerserve.types import VerdictKind

Side = Literal["request", "response"]
Mode = processing_mode_pb2.ProcessingMode

VERDICT_HEADER = "x-steerserve-verdict"
_METADATA = "steerserve"


def headers_reply(side: Side, set_headers: Mapping[str, str], remove: tuple[str, ...] = ()) -> pb.ProcessingResponse:
    """Go on, with other headers."""
    mutation = _header_mutation(set_headers, remove)
    reply = pb.HeadersResponse(response=pb.CommonResponse(header_mutation=mutation))
    return pb.ProcessingResponse(**{f"{side}_headers": reply})


def body_reply(
    side: Side, mode: int, received: bytes, sent: bytes, *, is_last: bool, verdict: VerdictKind | None
) -> pb.ProcessingResponse:
    """Go on with ``sent`` in the place of ``received``, the last message about this body if ``is_last``.

    A buffered body's headers wait for it: they get the verdict, and the new length, which Envoy leaves to us. In the
    other modes they are gone by then, and Envoy has taken the length out of them.
    """
    common = pb.CommonResponse()
    if mode == Mode.FULL_DUPLEX_STREAMED:
        common.body_mutation.streamed_response.body = sent
        common.body_mutation.streamed_response.end_of_stream = is_last
    elif sent != received:
        if sent:
            common.body_mutation.body = sent
        else:
            common.body_mutation.clear_body = True
    if mode == Mode.BUFFERED:
        headers = {} if verdict is None else {VERDICT_HEADER: verdict.value}
        if sent != received:
            headers["content-length"] = str(len(sent))
        common.header_mutation.CopyFrom(_header_mutation(headers))
    reply = pb.ProcessingResponse(**{f"{side}_body": pb.BodyResponse(response=common)})
    if is_last and verdict is not None:
        reply.dynamic_metadata.CopyFrom(_metadata(side, verdict))
    return reply


def trailers_reply(side: Side) -> pb.ProcessingResponse:
    """Go on."""
    return pb.ProcessingResponse(**{f"{side}_trailers": pb.TrailersResponse()})


def refusal(status: int, code: str, message: str, verdict: VerdictKind) -> pb.ProcessingResponse:
    """End the exchange with an error in OpenAI's shape."""
    error_type = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": error_type, "param": None, "code": code}}
    reply = pb.ImmediateResponse(
        status=http_status_pb2.HttpStatus(code=status),
        headers=_header_mutation({"content-type": "application/json", VERDICT_HEADER: verdict.value}),
        body=dump(body),
        details=f"steerserve_{code}",
    )
    return pb.ProcessingResponse(immediate_response=reply)


def _header_mutation(set_headers: Mapping[str, str], remove: tuple[str, ...] = ()) -> pb.HeaderMutation:
    return pb.HeaderMutation(
        set_headers=[
            base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=key, raw_value=value.encode()),
                append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for key, value in set_headers.items()
        ],
        remove_headers=remove,
    )


def _metadata(side: Side, verdict: VerdictKind) -> Struct:
    metadata = Struct()
    metadata.update({_METADATA: {f"{side}_verdict": verdict.value}})
    return metadata
