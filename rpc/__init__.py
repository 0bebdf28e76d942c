"""The only package that knows gRPC."""
