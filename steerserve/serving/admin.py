"""The port of operators: what only they may call is bound to an address of its own, and is not on the other one."""

from __future__ import annotations

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from steerserve.config import ServerConfig
from steerserve.serving.decoding import DecodingInterceptor
from steerserve.serving.listening import bind, check_exposed
from steerserve.serving.policy_servicer import PolicyServicer
from steerserve.v1 import policy_pb2, policy_pb2_grpc

POLICY_SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name


class AdminServer:
    """Answers ``PolicyService``, and nothing else, from ``start`` to ``stop``.

    Attributes:
        address: ``host:port`` as bound.

    Raises:
        AssetError: the address cannot be bound.
        InvalidRequestError: others could reach it without a key, or read one on the wire.
    """

    def __init__(
        self, port: int, config: ServerConfig, policies: PolicyServicer, credentials: grpc.ServerCredentials | None
    ) -> None:
        check_exposed("--admin-host", config.access.admin_host, config.access)
        options = [("grpc.max_receive_message_length", config.max_message_bytes), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options, interceptors=(DecodingInterceptor(),))
        self.address = bind(self._server, config.access.admin_host, port, credentials)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(policies, self._server)
        reflection.enable_server_reflection((POLICY_SERVICE, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Take calls."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Take no more; those that run have ``grace_s`` seconds."""
        await self._server.stop(grace_s)
