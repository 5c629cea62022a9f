"""Ours against the published implementations: the same settings and tokens, figures side by side."""
