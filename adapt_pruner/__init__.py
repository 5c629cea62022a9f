"""Adapt-Pruner (arXiv:2502.03460), the method under study, one file per idea.

``layer_importance`` says how much each layer does, ``sparsity`` how that moves each layer's share, ``step`` which units
leave in one step, and ``adaptive`` makes a step of the three. ``pruner`` takes such steps down to each target,
``accel`` in rounds with training between them.
"""

from adapt_pruner.accel import AdaptAccel
from adapt_pruner.pruner import AdaptPruner

__all__ = ["AdaptAccel", "AdaptPruner"]
