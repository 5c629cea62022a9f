"""The competitors: the one list of methods, and the entry-point group through which outside plugins join it."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, ValidationError

from harness.errors import UserError, first_line, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from harness.method import PruningMethod
    from harness.published import PublishedCase

    PublishedReader = Callable[[Mapping[str, Any], int], Iterator[PublishedCase]]

# Name -> where the class is. Strings, so that listing names imports no torch.
METHODS: dict[str, str] = {
    "dense": "baselines.dense:Dense",
    "random": "baselines.random_control:Random",
    "magnitude": "baselines.magnitude:Magnitude",
    "llm-pruner": "baselines.llm_pruner:LLMPruner",
    "flap": "baselines.flap:FLAP",
    "slicegpt": "baselines.slicegpt:SliceGPT",
    "adapt-pruner": "adapt_pruner:AdaptPruner",
    "adapt-accel": "adapt_pruner:AdaptAccel",
}

# Method -> what reads the figures measured on its published implementation.
PUBLISHED_READERS: dict[str, str] = {
    "llm-pruner": "baselines.published:llm_pruner_cases",
    "flap": "baselines.published:flap_cases",
    "slicegpt": "baselines.published:slicegpt_cases",
    "adapt-pruner": "adapt_pruner.published:adapt_pruner_cases",
}

PLUGIN_GROUP = "harness.methods"
"""Entry-point group of methods in other packages: name = the method's spelling, value = ``module:Class``."""


def known_methods() -> dict[str, str]:
    """Every method by name, built in and plugged in.

    Raises:
        UserError: a plugin uses a name that is taken.
    """
    methods = dict(METHODS)
    for point in entry_points(group=PLUGIN_GROUP):
        if point.name in methods:
            raise UserError(
                f"the plugin {point.value} registers the method {point.name!r}, which exists already; "
                "give it another name or uninstall it"
            )
        methods[point.name] = point.value
    return methods


def method_class(name: str) -> type[PruningMethod]:
    """The class of a method.

    Raises:
        UserError: no method has that name.
    """
    from harness.method import PruningMethod  # with torch, which listing names does without

    known = known_methods()
    if name not in known:
        raise unknown_name("method", name, known, "harness methods")
    loaded = _imported(known[name])
    if not (isinstance(loaded, type) and issubclass(loaded, PruningMethod)) or inspect.isabstract(loaded):
        raise UserError(
            f"the entry point {known[name]!r} is no PruningMethod with its prune(); see docs/adding-a-method.md"
        )
    return loaded


def published_reader(name: str) -> PublishedReader:
    """What turns a golden file's content, and the dense model's intermediate size, into published cases.

    Raises:
        UserError: no figures of that method's published implementation are known.
    """
    if name not in PUBLISHED_READERS:
        raise unknown_name("method with published figures", name, PUBLISHED_READERS, "harness verify --help")
    reader: PublishedReader = _imported(PUBLISHED_READERS[name])
    return reader


def build_method(name: str, params: dict[str, JsonValue] | None = None) -> PruningMethod:
    """A method with its hyper-parameters checked.

    Args:
        name: its spelling in the registry.
        params: hyper-parameters that differ from the method's defaults.

    Raises:
        UserError: an unknown method, an unknown hyper-parameter, or a value it does not take.
    """
    cls = method_class(name)
    params = params or {}
    for key in params:
        if key not in cls.model_fields:
            raise unknown_name(f"setting of {name}", key, cls.model_fields, f"harness methods {name}")
    try:
        return cls(**_as_any(params))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{name}.{field} = {first['input']!r} is not allowed: {first['msg'].lower()}") from error


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plugin's module may raise anything
        raise UserError(
            f"the entry point {place!r} cannot be imported ({type(error).__name__}: {first_line(error)}); mend or "
            "uninstall the package that brings it"
        ) from error


def _as_any(params: dict[str, JsonValue]) -> dict[str, Any]:
    return dict(params)
