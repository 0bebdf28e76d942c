"""HTTP API, templates and tokens, placement, the life of a request."""
