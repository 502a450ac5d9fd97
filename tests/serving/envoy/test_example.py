"""The example is what Envoy reads, and asks for what the processor expects."""

from __future__ import annotations

from pathlib import Path

import yaml
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.extensions.filters.http.ext_proc.v3 import ext_proc_pb2
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode as Mode
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401  (types that the example names)
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as manager_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2  # noqa: F401
from google.protobuf.json_format import ParseDict

EXAMPLE = Path(__file__).parents[3] / "examples" / "envoy" / "envoy.yaml"


def test_the_example_is_a_bootstrap_with_the_processor_in_front_of_the_router() -> None:
    bootstrap = ParseDict(yaml.safe_load(EXAMPLE.read_text()), bootstrap_pb2.Bootstrap())
    (listener,) = bootstrap.static_resources.listeners
    manager = manager_pb2.HttpConnectionManager()
    assert listener.filter_chains[0].filters[0].typed_config.Unpack(manager)
    processor = ext_proc_pb2.ExternalProcessor()
    assert manager.http_filters[0].typed_config.Unpack(processor)
    assert not processor.failure_mode_allow
    assert processor.processing_mode.request_body_mode == Mode.BUFFERED
    assert processor.processing_mode.response_body_mode == Mode.STREAMED
    clusters = {cluster.name for cluster in bootstrap.static_resources.clusters}
    assert processor.grpc_service.envoy_grpc.cluster_name in clusters
    assert {route.route.cluster for route in manager.route_config.virtual_hosts[0].routes} <= clusters
