"""From flags and config files to a checked comparison; unknown names and impossible numbers stop here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from harness.compare import Comparison, competes
from harness.corpora import file_digest
from harness.errors import UserError, unknown_name
from harness.models.catalog import CATALOG
from harness.parsing import json_value, listed, one_of, one_seed, read_toml, refused
from harness.records import (
    Basis,
    CalibrationSpec,
    Dtype,
    EfficiencySpec,
    EvaluationSpec,
    ModelRef,
    TrainingSpec,
)
from harness.registry import build_method, known_methods
from harness.training_request import recovery_specs

PROFILES: dict[str, dict[str, Any]] = {
    "quick": {
        "tasks": ["commonsense", "mmlu"],
        "limit": 40,
        "mmlu_limit": 1,
        "mmlu_num_fewshot": 0,
        "heldout_tokens": 4096,
    },
    "standard": {
        "tasks": ["commonsense", "mmlu", "mmlu_continuation"],
        "limit": 200,
        "mmlu_limit": 10,
        "mmlu_num_fewshot": 5,
        "heldout_tokens": 32768,
    },
    "full": {
        # Without boolq, whose passages are the text that methods calibrate on unless they are told otherwise.
        "tasks": [
            *("commonsense", "mmlu", "mmlu_continuation"),
            *("lambada_openai", "sciq", "commonsense_qa", "copa"),
        ],
        "limit": None,
        "mmlu_limit": None,
        "mmlu_num_fewshot": 5,
        "heldout_tokens": 131072,
    },
}
"""What is scored, and how much of it: quick fits a quarter of an hour on two cores, full is every document."""

PROFILE_METHOD_PARAMS: dict[str, dict[str, dict[str, JsonValue]]] = {
    # Each of some 25 steps runs forward and backward: on all sequences they would take half an hour.
    "quick": {"adapt-pruner": {"samples_per_step": 8}},
}
"""Settings that a profile gives to methods, under those of the file and the flags; records and tables show them."""

# Flags of `harness compare` that say where and how it is run rather than what is compared: not for a config file.
NOT_IN_FILE = {
    *("config", "set_", "force", "out", "device", "batch_tokens", "stream", "shard"),
    *("executor", "ray_address", "track_cpus", "track_gpus", "track_memory"),
}

YES_OR_NO = {"efficiency", "offline", "uniform"}
"""Those of the others that are true or false."""

BASES: tuple[Basis, ...] = ("total", "non-embedding")
DTYPES: tuple[Dtype | Literal["auto"], ...] = ("auto", "float32", "bfloat16")
"""``auto`` is bfloat16 where the device multiplies it in hardware."""


def comparison_from(flags: Mapping[str, Any], given: Iterable[str], config: Path | None) -> Comparison:
    """A comparison from flags, and from a file for those that were not given on the command line.

    Args:
        flags: every flag by its Python name.
        given: the flags that were typed rather than left at their defaults.
        config: a .toml file with the same names (lists where flags have commas) and tables ``[params.<method>]``.

    Raises:
        UserError: naming what was given, what is allowed and what to do.
    """
    settings = dict(flags)
    params: dict[str, dict[str, JsonValue]] = {}
    if config is not None:
        file = read_toml(config)
        params = _method_tables(file.pop("params", {}), config)
        allowed = set(flags) - NOT_IN_FILE
        for key, value in file.items():
            if key not in allowed:
                raise unknown_name(f"setting in {config}", key, allowed | {"params"}, "harness compare --help")
            if isinstance(value, bool) != (key in YES_OR_NO):
                allowed_values = "true or false" if key in YES_OR_NO else "a number, a text or a list"
                raise UserError(f"{key} = {json.dumps(value, default=str)} in {config} is not {allowed_values}")
            if key not in set(given):
                settings[key] = value
    methods = _method_names(listed(settings["methods"]))
    for method, affordable in PROFILE_METHOD_PARAMS.get(str(settings["profile"]), {}).items():
        if method in methods:
            params[method] = {**affordable, **params.get(method, {})}
    for method, changed in _parsed_settings(settings["set_"]).items():
        params[method] = {**params.get(method, {}), **changed}
    for method, changed in params.items():
        build_method(method, changed)
        if method not in methods:
            raise UserError(f"settings were given for {method!r}, which is not compared; add it to --methods")
    recoveries = recovery_specs(
        settings["recovery"], settings["recovery_tokens"], settings["recovery_text"], settings["train"]
    )
    if listed(settings["methods"]) != ["all"]:
        _check_competing(methods, recoveries)
    if settings["stream"] and any(recoveries):
        raise UserError("--stream leaves weights in their files, where they cannot be trained; leave out --recovery")
    return Comparison(
        models=tuple(model_ref(name) for name in listed(settings["models"])),
        methods=methods,
        method_params=params,
        sparsities=tuple(one_sparsity(value) for value in listed(settings["sparsities"])),
        basis=one_of("basis", settings["basis"], BASES),
        seeds=tuple(one_seed(value) for value in listed(settings["seeds"])),
        dtype=chosen_dtype(settings["dtype"], one_device(settings["device"])),
        recoveries=recoveries,
        round_to=one_multiple(settings["round_to"]),
        uniform=True if settings["uniform"] else None,
        calibration=calibration_spec(
            settings["calibration"], settings["calibration_samples"], settings["calibration_length"]
        ),
        evaluation=evaluation_spec(
            settings["tasks"],
            settings["profile"],
            settings["limit"],
            settings["mmlu_limit"],
            settings["mmlu_shots"],
            settings["heldout_tokens"],
            settings["offline"],
        ),
        # The time of a streamed model is that of reading it.
        efficiency=EfficiencySpec() if settings["efficiency"] and not settings["stream"] else None,
    )


def _method_tables(params: Any, config: Path) -> dict[str, dict[str, JsonValue]]:
    if not isinstance(params, dict) or not all(isinstance(table, dict) for table in params.values()):
        raise UserError(f"params in {config} are not tables; write [params.flap] and its settings below it")
    return params


def chosen_dtype(dtype: str, device: str) -> Dtype:
    """The dtype that was asked for, ``auto`` resolved for a device.

    Raises:
        UserError: it is none of ``DTYPES``, or ``auto`` was asked of a device that cannot be used here.
    """
    from harness.models.loading import fast_dtype

    asked = one_of("dtype", dtype, DTYPES)
    return fast_dtype(device) if asked == "auto" else asked


def one_device(device: str) -> str:
    """A device that a model can be pruned on.

    Raises:
        UserError: ``auto``, which spreads a model over several.
    """
    if device == "auto":
        raise UserError(
            "--device auto spreads a model over several devices, where it can be scored (`harness evaluate`) but not "
            "pruned; name one device, such as cuda"
        )
    return device


def calibration_spec(source: str, num_samples: int, num_tokens: int) -> CalibrationSpec:
    """Checked calibration settings.

    Raises:
        UserError: a size below the smallest that makes sense, or a file that cannot be read.
    """
    digest = file_digest(source)
    try:
        return CalibrationSpec(source=source, num_samples=num_samples, num_tokens=num_tokens, sha256=digest)
    except ValidationError as error:
        raise refused("calibration", error) from error


def _check_competing(methods: tuple[str, ...], recoveries: tuple[TrainingSpec | None, ...]) -> None:
    for name in methods:
        method = build_method(name)
        if name != "dense" and not any(competes(method, recovery) for recovery in recoveries):
            raise UserError(
                f"{name} trains between its pruning steps, so it needs a training of all weights; "
                "add --recovery full --recovery-tokens N, or leave it out"
            )


def evaluation_spec(
    tasks: str | list[str] | None,
    profile: str,
    limit: int | None,
    mmlu_limit: int | None,
    mmlu_shots: int | None,
    heldout_tokens: int | None,
    offline: bool | None,
) -> EvaluationSpec:
    """Checked evaluation settings: a profile, and what was asked for instead of it.

    Raises:
        UserError: an unknown profile or task, or a limit of 0.
    """
    from harness.evaluation.tasks import expand_tasks
    from harness.report.frame import COLUMNS

    values = dict(PROFILES[one_of("profile", profile, tuple(PROFILES))])
    profile_tasks = values.pop("tasks")
    asked = {"limit": limit, "mmlu_limit": mmlu_limit, "mmlu_num_fewshot": mmlu_shots, "heldout_tokens": heldout_tokens}
    values |= {key: value for key, value in asked.items() if value is not None}
    if values["heldout_tokens"] == 1:
        raise UserError("--heldout-tokens 1 leaves no token to predict; pass 0 to measure none, or at least 2")
    chosen, files = expand_tasks(profile_tasks if tasks is None else listed(tasks))
    for file in files:
        if file.name in COLUMNS:
            raise UserError(
                f"{file.path} calls its task {file.name!r}, as a column of the table is; change its `task:`"
            )
    try:
        return EvaluationSpec(
            tasks=chosen,
            task_files=files or None,
            data="hub" if offline is False else "embedded",
            **values,
        )
    except ValidationError as error:
        raise refused("evaluation", error) from error


def settings_of(method: str, changes: list[str]) -> dict[str, JsonValue]:
    """Hyper-parameters of one method from ``key=value`` or ``method.key=value`` texts, checked."""
    prefixed = [change if change.startswith(f"{method}.") else f"{method}.{change}" for change in changes]
    params = _parsed_settings(prefixed).get(method, {})
    build_method(method, params)
    return params


def one_sparsity(value: str | float) -> float:
    """A sparsity as a number in [0, 1).

    Raises:
        UserError: it is not one.
    """
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise UserError(f"sparsity {value} is not in [0, 1); pass the fraction to remove, such as 0.2 for 20%")
    return number


def one_multiple(value: int | None) -> int | None:
    """A multiple for widths; 1 and none leave them free.

    Raises:
        UserError: it is not a positive whole number.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"--round-to {value} is not a multiple; pass a positive number, such as 64")
    return None if value == 1 else value


def model_ref(name: str) -> ModelRef:
    """A model by catalog name, hub id or folder; whether it loads shows when it is loaded.

    Args:
        name: one of the three; ``@`` and a branch, tag or commit may follow the first two.

    Raises:
        UserError: the name can be none of the three.
    """
    known, _, revision = name.partition("@")
    if known in CATALOG:
        return ModelRef(name=known, revision=revision or CATALOG[known].revision)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return ModelRef(name=str(folder.resolve()))
    if name.startswith((".", "/", "~")):
        raise UserError(f"there is no model folder {name}; pass a save_pretrained folder, a hub id or a catalog name")
    if known.count("/") != 1:
        raise unknown_name("model", known, CATALOG, "harness models")
    return ModelRef(name=known, revision=revision or None)


def published_methods(names: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the methods with published figures that are named, or all of them.

    Raises:
        UserError: a name is not one of them.
    """
    if (asked := listed(names)) == ["all"]:
        return known
    return tuple(one_of("method with published figures", name, known) for name in asked)


def _method_names(names: list[str]) -> tuple[str, ...]:
    known = known_methods()
    if names == ["all"]:
        return tuple(known)
    for name in names:
        if name not in known:
            raise unknown_name("method", name, [*known, "all"], "harness methods")
    # Differences are taken from the dense model, so it is always there.
    return tuple(dict.fromkeys(["dense", *names]))


def _parsed_settings(changes: list[str]) -> dict[str, dict[str, JsonValue]]:
    parsed: dict[str, dict[str, JsonValue]] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        method, dot, field = key.partition(".")
        if not (equals and dot and field):
            raise UserError(f"--set {change!r} is not of the form method.setting=value, such as flap.metric=wifn")
        parsed.setdefault(method, {})[field] = json_value(value)
    return parsed
