"""The wire: everything that knows protobuf or gRPC."""
