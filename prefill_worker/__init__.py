"""The P role: chunked prefill, export, leases."""
