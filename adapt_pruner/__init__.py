"""Adapt-Pruner (arXiv:2502.03460), the method under study, one file per idea.

``layer_importance`` says how much each layer does, ``sparsity`` how that moves each layer's share, ``step`` which units
leave in one step, and ``pruner`` puts them in a loop.
"""

from adapt_pruner.pruner import AdaptPruner

__all__ = ["AdaptPruner"]
