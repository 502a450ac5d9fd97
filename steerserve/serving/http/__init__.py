"""The OpenAI-compatible HTTP interface: JSON and server-sent events in front of the same ``Service`` as gRPC."""
