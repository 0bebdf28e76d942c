"""Load and measurements."""
