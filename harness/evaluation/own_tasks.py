"""Tasks of a user's own: lm-eval YAML files, named by path where a task is named."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks._yaml_loader import load_yaml

from harness.errors import UserError
from harness.records import TaskFile

SUFFIXES = (".yaml", ".yml")
INDEX_KEYS = ("tag", "group", "task_list")
"""Keys of a YAML file that lay out lm-eval's index and say nothing of the task."""


def split(names: Sequence[str], taken: Collection[str]) -> tuple[tuple[str, ...], tuple[TaskFile, ...]]:
    """Task names with every path replaced by the name its file gives the task, and the files.

    Args:
        names: tasks, groups, and paths of YAML files.
        taken: names that files may not give.

    Raises:
        UserError: a file cannot be read, is not a task of lm-eval's format, or its name is taken.
    """
    shown: list[str] = []
    files: list[TaskFile] = []
    for name in names:
        if not name.endswith(SUFFIXES):
            shown.append(name)
            continue
        file = read_file(Path(name))
        if file.name in (*taken, *(other.name for other in files)):
            raise UserError(f"{name} calls its task {file.name!r}, which is another's name; change its `task:`")
        shown.append(file.name)
        files.append(file)
    return tuple(shown), tuple(files)


def read_file(path: Path) -> TaskFile:
    """A YAML file by its content.

    Raises:
        UserError: it cannot be read, or is not a task of lm-eval's format.
    """
    config = definition(path)
    name = config.get("task")
    if not isinstance(name, str) or not name or "/" in name:
        raise UserError(f"{path} has no `task: NAME`; it is no task of lm-eval's format (groups are not taken)")
    return TaskFile(name=name, path=str(path.resolve()), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def definition(path: Path) -> dict[str, Any]:
    """The content of a YAML file, what it includes included.

    Raises:
        UserError: it cannot be read.
    """
    try:
        config = load_yaml(path)
    except Exception as error:  # the file's own functions are imported with it and may raise anything
        raise UserError(f"the task file {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"the task file {path} is not a mapping; it should be a task of lm-eval's format")
    return {key: value for key, value in config.items() if key not in INDEX_KEYS}


def unchanged(file: TaskFile) -> dict[str, Any]:
    """The definition of a task file that a run was asked for.

    Raises:
        UserError: the file is gone, or has changed since.
    """
    path = Path(file.path)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
        raise UserError(f"the task file {path} is gone or has changed since the run was asked for; ask again")
    return definition(path)
