"""Generated from proto/worker.proto by `make proto`. Do not edit."""
