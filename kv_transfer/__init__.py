"""Layouts, leases, params, and the connectors that move KV blocks."""
