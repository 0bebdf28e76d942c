"""Parsers of model output: thoughts and tool calls out of the markup of each model family."""
