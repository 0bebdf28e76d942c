"""Attention backends behind one small protocol (engine.attention.base)."""
