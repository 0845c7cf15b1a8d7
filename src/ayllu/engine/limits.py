"""Limits of generation that rooms above show to people. Needs no torch."""

DEFAULT_CONTEXT = 8192
"""Context window in tokens when none is asked for: fits a small machine, where a model's own longest may be
millions of tokens."""
