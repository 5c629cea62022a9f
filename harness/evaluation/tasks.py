"""lm-eval's own task definitions (prompts, targets, metrics, groups), bound to embedded documents or to the hub."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import GroupConfig
from lm_eval.tasks._yaml_loader import load_yaml

from harness.errors import UserError, first_line, unknown_name
from harness.evaluation import embedded_data, own_tasks
from harness.evaluation.quiet import quiet, templates_compiled_once
from harness.records import EvaluationSpec, TaskFile

Data = Literal["embedded", "hub"]

COMMONSENSE = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande", "social_iqa")
"""The suite of the paper under study, in the order of its tables."""

FEWSHOT_SEED = 1234
"""Of worked examples. Source: lm-eval's simple_evaluate."""

_FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "sciq": "sciq/sciq.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
"""Task -> its stock definition below lm-eval's ``tasks`` folder."""

_GROUP_FOLDERS = {"mmlu": "mmlu/default", "mmlu_continuation": "mmlu/continuation"}
"""Group -> the folder of its stock definitions."""

_ALIASES = {
    "commonsense": COMMONSENSE,
    "suite": (
        *COMMONSENSE, "mmlu", "mmlu_continuation", "boolq", "lambada_openai", "sciq", "commonsense_qa", "copa",
    ),
}  # fmt: skip


def known_tasks() -> tuple[str, ...]:
    """Every name ``expand_tasks`` takes: tasks, lm-eval groups, and our names for several tasks."""
    return (*_ALIASES, *_GROUP_FOLDERS, *_FILES)


def expand_tasks(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[TaskFile, ...]]:
    """Task and group names with ``commonsense`` written out, each once, in the order given; and a user's own files.

    Args:
        names: known ones, and paths of lm-eval YAML files.

    Raises:
        UserError: a name is not known, a file is no task, or there is none.
    """
    named, files = own_tasks.split(names, known_tasks())
    expanded = _written_out(named, {file.name for file in files})
    if not expanded:
        raise UserError(f"no task was given; name at least one of {', '.join(known_tasks())}")
    return expanded, files


def _written_out(names: Iterable[str], own: Collection[str]) -> tuple[str, ...]:
    """Each once, in the order given, names for several tasks replaced by those.

    Raises:
        UserError: a name is neither known nor a user's own.
    """
    expanded: dict[str, None] = {}
    for name in names:
        if name not in known_tasks() and name not in own:
            raise unknown_name("task", name, known_tasks(), "harness tasks")
        expanded.update(dict.fromkeys(_ALIASES.get(name, (name,))))
    return tuple(expanded)


@dataclass(frozen=True, slots=True)
class TaskSet:
    """The tasks of an evaluation, ready for lm-eval."""

    objects: tuple[ConfigurableTask | Group, ...]
    """What lm-eval is handed: tasks, and groups with their tasks inside."""
    leaves: dict[str, ConfigurableTask] = field(default_factory=dict)
    """Task name -> task, the tasks inside groups included."""
    group_of: dict[str, str] = field(default_factory=dict)
    """Leaf name -> the name that was asked for: ``mmlu_anatomy`` -> ``mmlu``, ``piqa`` -> ``piqa``."""
    samples: dict[str, list[int]] = field(default_factory=dict)
    """Leaf name -> the documents to score; a leaf that is absent is scored whole."""
    notes: tuple[str, ...] = ()

    def reseed(self) -> None:
        """Draw worked examples from the start again: a task goes on drawing with every prompt that it builds."""
        for task in self.leaves.values():
            task.set_fewshot_seed(FEWSHOT_SEED)

    def documents(self, leaf: str) -> Dataset:
        """The documents that are scored, in lm-eval's order."""
        documents = self.leaves[leaf].eval_docs
        return documents.select(self.samples[leaf]) if leaf in self.samples else documents

    def right_choice(self, leaf: str, document: dict[str, Any]) -> int | None:
        """Index of the right choice of a document; None where nothing is chosen from, or not one choice is right."""
        task = self.leaves[leaf]
        if task.OUTPUT_TYPE != "multiple_choice":
            return None
        # With several contexts and one continuation (winogrande), lm-eval keeps the answer where others keep the text.
        target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        choices = task.doc_to_choice(document)
        if isinstance(target, str):
            return choices.index(target) if target in choices else None
        if isinstance(target, list):  # of several right ones
            return None
        return int(target) if 0 <= int(target) < len(choices) else None

    def chance(self, leaf: str, document: dict[str, Any]) -> float | None:
        """What guessing scores on a document: one over its number of choices; None where nothing is chosen from."""
        task = self.leaves[leaf]
        return 1 / len(task.doc_to_choice(document)) if task.OUTPUT_TYPE == "multiple_choice" else None


def choose_documents(task: str, num_documents: int, limit: int | None, seed: int) -> list[int] | None:
    """Which documents a limit keeps, sorted; None keeps all. A larger limit keeps what a smaller one kept."""
    if limit is None or limit >= num_documents:
        return None
    order = list(range(num_documents))
    random.Random(f"{seed}/{task}").shuffle(order)
    return sorted(order[:limit])


@cache
def build_tasks(spec: EvaluationSpec) -> TaskSet:
    """The task objects for a spec; memoised, so that scoring several models builds them once.

    Raises:
        UserError: an unknown task, a task whose data is not embedded, or a hub out of reach.
    """
    task_set = TaskSet(objects=(), notes=())
    objects: list[ConfigurableTask | Group] = []
    notes: list[str] = []
    with quiet(), templates_compiled_once():
        own = {file.name: file for file in spec.task_files or ()}
        for name in _written_out(spec.tasks, own):
            is_group = name in _GROUP_FOLDERS
            binding = _Binding(spec.data, spec.mmlu_num_fewshot if is_group else 0)
            if name in own:
                built: ConfigurableTask | Group = binding.own(own[name])
            else:
                built = binding.group(name) if is_group else binding.task(_tasks_folder() / _FILES[name])
            objects.append(built)
            source = embedded_data.SOURCES.get(name)
            if spec.data == "embedded" and source is not None and source.differs:
                notes.append(source.differs)
            for leaf in built.get_all_tasks() if isinstance(built, Group) else [built]:
                task_set.leaves[leaf.task_name] = leaf
                task_set.group_of[leaf.task_name] = name
                limit = spec.mmlu_limit if is_group else spec.limit
                chosen = choose_documents(leaf.task_name, len(leaf.eval_docs), limit, spec.document_seed)
                if chosen is not None:
                    task_set.samples[leaf.task_name] = chosen
    return TaskSet(tuple(objects), task_set.leaves, task_set.group_of, task_set.samples, tuple(notes))


def _tasks_folder() -> Path:
    return Path(lm_eval.tasks.__file__).parent


@dataclass(frozen=True, slots=True)
class _Binding:
    """Turns stock definitions into objects."""

    data: Data
    num_fewshot: int

    def task(self, path: Path) -> ConfigurableTask:
        """The task of a stock YAML file."""
        config = own_tasks.definition(path)
        config["num_fewshot"] = self.num_fewshot
        config["training_split"] = None  # not embedded, and no prompt here draws from it
        if not self.num_fewshot:
            config["fewshot_config"] = {"samples": []}  # spares the pool of examples that 0-shot never draws from
            config["fewshot_split"] = None
        if (process := config.get("process_docs")) is not None:
            config["process_docs"] = _processed_once(process)
        if self.data == "embedded":
            config["custom_dataset"] = partial(_embedded_documents, config["task"], config.get("dataset_name"))
            if (source := embedded_data.SOURCES.get(config["task"])) is not None and source.differs:
                config["test_split"] = None
        return self._construct(config)

    def own(self, file: TaskFile) -> ConfigurableTask:
        """A user's task, with the documents and worked examples that its file asks for.

        Raises:
            UserError: its answers are not chosen from a list, its documents cannot be reached, or lm-eval cannot make
                its requests.
        """
        config = own_tasks.unchanged(file)
        own_tasks.require_countable(file.name, config)
        config.setdefault("num_fewshot", 0)
        if not config["num_fewshot"]:
            config["fewshot_config"] = {"samples": []}
        try:
            task = self._construct(config)
            task.build_all_requests()  # what is wrong with the file shows here, before anything is pruned
        except UserError:
            raise
        except Exception as error:  # of lm-eval, of its templates, of the file's own functions
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"the task file {file.path} cannot be used: {what}") from error
        return task

    def _construct(self, config: dict[str, Any]) -> ConfigurableTask:
        try:
            task = ConfigurableTask(config=config)
        except OSError as error:
            if config.get("dataset_path") in ("json", "csv", "parquet", "text"):
                raise UserError(
                    f"the documents of task {config['task']!r} cannot be read: {error}; paths count from the folder "
                    "that the command is called in"
                ) from error
            raise UserError(
                f"the documents of task {config['task']!r} ({config['dataset_path']}) cannot be reached: "
                f"{error}; connect to the hub, fill its cache with `hf download --repo-type dataset "
                f"{config['dataset_path']}`, or use the embedded data"
            ) from error
        task.set_fewshot_seed(FEWSHOT_SEED)
        return task

    def group(self, name: str) -> Group:
        """An lm-eval group with its subgroups and tasks, as its stock YAML files lay it out."""
        definitions = _Definitions.read(_tasks_folder() / _GROUP_FOLDERS[name])
        return self._group(definitions.groups[name], definitions)

    def _group(self, config: dict[str, Any], definitions: _Definitions) -> Group:
        group = Group.from_config(GroupConfig(**config))
        for member in config["task"]:
            for child in self._members(member, config["group"], definitions):
                group.add(child)
        return group

    def _members(
        self, member: str | dict[str, Any], parent: str, definitions: _Definitions
    ) -> Iterator[ConfigurableTask | Group]:
        if isinstance(member, dict):  # a subgroup written inside its parent
            yield self._group({**member, "group": f"{parent}::{member['group']}"}, definitions)
        elif member in definitions.groups:
            yield self._group(definitions.groups[member], definitions)
        else:
            for path in definitions.tagged[member]:
                yield self.task(path)


@dataclass(frozen=True, slots=True)
class _Definitions:
    """The stock YAML files of one folder: groups by name, and the files of the tasks under each tag."""

    groups: dict[str, dict[str, Any]]
    tagged: dict[str, list[Path]]

    @staticmethod
    @cache
    def read(folder: Path) -> _Definitions:
        found = _Definitions({}, {})
        for path in sorted(folder.glob("*.yaml")):
            config = load_yaml(path, resolve_func=False, recursive=False)
            if "group" in config:
                found.groups[config["group"]] = config
            else:
                found.tagged.setdefault(config["tag"], []).append(path)
        return found


def _embedded_documents(task: str, dataset_name: str | None, **_metadata: Any) -> dict[str, Dataset]:
    """The data set lm-eval asks for by calling ``custom_dataset`` with the metadata of the task."""
    if task in embedded_data.SOURCES:
        return embedded_data.load_task(task)
    if task.startswith("mmlu_") and dataset_name is not None:
        return embedded_data.load_mmlu_subject(dataset_name)
    raise UserError(f"the documents of task {task!r} are not embedded; use the hub's (--online)")


def _processed_once(process: Any) -> Any:
    """``process_docs`` for one data set; lm-eval asks for the processed documents three times and more."""
    processed: list[Dataset] = []

    def once(documents: Dataset) -> Dataset:
        if not processed:
            processed.append(process(documents))
        return processed[0]

    return once
