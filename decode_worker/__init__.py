"""The D role: admission, pull and verify, continuous batching."""
