"""Keeps lm-eval, datasets and transformers from writing on the terminal, and lm-eval from compiling templates anew."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.utils

from harness.models.bars import without_bars

_LOGGERS = ("lm_eval", "lm-eval", "datasets", "transformers", "huggingface_hub")


def _no_bar(items: Any, *_args: Any, **_kwargs: Any) -> Any:
    return items


@contextmanager
def quiet() -> Iterator[None]:
    """Within it only errors of the libraries are logged, and their progress bars are off; all is put back after."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    progress_bar = lm_eval.api.task.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        # lm-eval offers no switch for the bar over the documents whose prompts it builds.
        lm_eval.api.task.tqdm = _no_bar
        with without_bars():
            yield
    finally:
        lm_eval.api.task.tqdm = progress_bar
        if had_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Within it lm-eval's Jinja environment compiles each template text once instead of once per document."""
    environment = lm_eval.utils.env
    environment.from_string = functools.cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string
