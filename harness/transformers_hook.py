"""Tells transformers of pruned models when a program imports its Auto model classes, so that they load like stock ones.

transformers has no entry points: it knows a model type that is registered in the running process, or code that comes
with the folder and must be trusted. An installed ``adapt_pruner_harness.pth`` imports this file when Python starts; it
imports nothing but the standard library and does nothing until transformers' Auto model classes are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.modeling_auto"
REGISTERS = "harness.models.registration"


class AutoClassesFinder(MetaPathFinder):
    """Finds the Auto model classes as Python would, once, and has pruned models registered after they ran."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the Auto model classes with a loader that goes on to register; None for all else."""
        if fullname != AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = RegisteringLoader(spec.loader)
        return spec


class RegisteringLoader(Loader):
    """Another loader, after which pruned models are registered."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register, at once or when a configuration is first read."""
        self.loader.exec_module(module)
        try:
            importlib.import_module(REGISTERS)
        except Exception:
            # transformers imports its Auto classes while it defines a configuration class, one that pruned models may
            # build on: what is not there yet will be when the program uses what it imports.
            _register_at_first_use()


def _register_at_first_use() -> None:
    """Have ``AutoConfig.from_pretrained``, which every Auto class goes through, register before it first runs."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto").AutoConfig
    plain = auto.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        auto.from_pretrained = plain
        try:
            importlib.import_module(REGISTERS)
        except Exception as error:  # the program may not want our models
            warnings.warn(
                f"pruned models cannot be loaded without trust_remote_code: adapt-pruner-harness does not work with "
                f"this environment ({type(error).__name__}: {error})",
                stacklevel=2,
            )
        return plain(*args, **kwargs)

    auto.from_pretrained = from_pretrained


if AUTO_CLASSES not in sys.modules and not any(isinstance(finder, AutoClassesFinder) for finder in sys.meta_path):
    sys.meta_path.insert(0, AutoClassesFinder())
