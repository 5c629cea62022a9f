"""Scores models on lm-eval's own tasks, local or hub data, and on held-out text: see ``run.evaluate``."""
