"""The routes: each decodes, calls and encodes."""
