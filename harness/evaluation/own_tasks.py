"""Tasks of a user's own: lm-eval YAML files, named by path where a task is named."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks._yaml_loader import load_yaml

from harness.errors import UserError
from harness.records import TaskFile

SUFFIXES = (".yaml", ".yml")
_GROUPS = ("mmlu_",)
"""How tasks inside a group begin."""
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
        if file.name.startswith(_GROUPS) or file.name in (*taken, *(other.name for other in files)):
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
    return TaskFile(name=name, path=str(path.resolve()), sha256=_digest(path, config))


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


def require_countable(name: str, config: dict[str, Any]) -> None:
    """Refuse a task whose right answers a leaderboard cannot count.

    Raises:
        UserError: saying what it should be.
    """
    if config.get("output_type") != "multiple_choice":
        raise UserError(
            f"task {name!r} has output_type {config.get('output_type', 'generate_until')}; a leaderboard counts right "
            "answers, so give a task with multiple_choice"
        )
    metrics = config.get("metric_list")
    if metrics is not None and "acc" not in [metric.get("metric") for metric in metrics]:
        raise UserError(f"task {name!r} lacks the metric acc; a leaderboard counts right answers, so add it")
    if config.get("filter_list") is not None:
        raise UserError(f"task {name!r} has a filter_list, but choices are compared as they are; remove it")


def unchanged(file: TaskFile) -> dict[str, Any]:
    """The definition of a task file that a run was asked for.

    Raises:
        UserError: the file is gone, or has changed since.
    """
    path = Path(file.path)
    config = definition(path) if path.is_file() else None
    if config is None or _digest(path, config) != file.sha256:
        raise UserError(f"the task file {path} is gone or has changed since the run was asked for; ask again")
    return config


def _digest(path: Path, config: dict[str, Any]) -> str:
    """Of the file, then of what it includes, the modules of its functions, and data files of this machine."""
    digest = hashlib.sha256(path.read_bytes())
    for further in dict.fromkeys([*_included(path), *_files_in(config)]):
        digest.update(further.read_bytes())
    return digest.hexdigest()


def _included(path: Path) -> Iterator[Path]:
    named = load_yaml(path, resolve_func=False, recursive=False).get("include", [])
    for name in [named] if isinstance(named, str) else named:
        included = path.parent / name
        yield included
        yield from _included(included)


def _files_in(value: Any) -> Iterator[Path]:
    """Modules of functions, and names below ``data_files`` that are files here."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (_named_files(item) if key == "data_files" else _files_in(item))
    elif isinstance(value, list):
        for item in value:
            yield from _files_in(item)
    elif inspect.isfunction(value) and (source := inspect.getsourcefile(value)):
        yield Path(source)


def _named_files(value: Any) -> Iterator[Path]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for item in values:
        if isinstance(item, list):
            yield from _named_files(item)
        elif isinstance(item, str) and Path(item).is_file():
            yield Path(item)
