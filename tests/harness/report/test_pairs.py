"""The pair matrix against the tests it is made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from harness import statistics
from harness.records import RunRecord
from harness.report import build_leaderboard
from harness.store import Store

Make = Callable[..., RunRecord]


def _answers(store: Store, record: RunRecord) -> dict[str, np.ndarray]:
    documents = store.documents(record.spec.run_id)
    assert documents is not None
    documents = documents[documents["group"].isna()]
    return {str(task): part["acc"].to_numpy() for task, part in documents.groupby("task")}


def test_every_pair_is_compared_and_corrected_over_all_pairs(store: Store, add_run: Make) -> None:
    add_run("dense", 0.0, 0.6, calibration=None)
    records = [add_run(method, 0.2, p) for method, p in (("flap", 0.6), ("slicegpt", 0.5), ("random", 0.2))]
    answers = {record.spec.method: _answers(store, record) for record in records}
    (table,) = build_leaderboard(store).pairs()
    assert table.names == ("flap", "slicegpt", "random")
    expected = [("flap", "slicegpt"), ("flap", "random"), ("slicegpt", "random")]
    assert list(zip(table.frame["first"], table.frame["second"], strict=True)) == expected
    bootstrap = [statistics.paired_bootstrap(answers[a], answers[b]) for a, b in expected]
    pooled = {method: np.concatenate(list(scores.values())) for method, scores in answers.items()}
    exact = [statistics.mcnemar(pooled[a], pooled[b]) for a, b in expected]
    assert table.frame["difference"].tolist() == pytest.approx([d.value for d in bootstrap])
    assert table.frame["p_bootstrap_holm"].tolist() == statistics.holm([d.p_value for d in bootstrap])
    assert table.frame["only_first"].tolist() == [test.only_first for test in exact]
    assert table.frame["p_mcnemar_holm"].tolist() == statistics.holm([test.p_value for test in exact])


def test_each_sparsity_has_its_own_matrix(store: Store, add_run: Make) -> None:
    for sparsity in (0.2, 0.4):
        for method in ("flap", "random"):
            add_run(method, sparsity)
    titles = [table.title for table in build_leaderboard(store).pairs()]
    assert ["at 20%" in titles[0], "at 40%" in titles[1]] == [True, True]


def test_mcnemar_is_left_out_where_a_method_has_several_seeds(store: Store, add_run: Make) -> None:
    add_run("flap", 0.2, 0.6)
    for seed in (0, 1):
        add_run("random", 0.2, 0.2, seed=seed)
    (table,) = build_leaderboard(store).pairs()
    assert table.frame[["only_first", "p_mcnemar", "p_mcnemar_holm"]].isna().all().all()
    assert table.frame["p_bootstrap_holm"].tolist() == table.frame["p_bootstrap"].tolist()
    assert "*" in table.matrix()[0][1]


def test_the_matrix_is_the_same_in_markdown_and_on_the_terminal(store: Store, add_run: Make) -> None:
    for method, p in (("flap", 0.6), ("random", 0.2)):
        add_run(method, 0.2, p)
    leaderboard = build_leaderboard(store)
    (table,) = leaderboard.pairs()
    cell = table.matrix()[0][1]
    assert cell in table.to_markdown()
    console = Console(width=200)
    with console.capture() as captured:
        console.print(leaderboard.pairs_to_rich())
    assert cell in captured.get()
    assert cell.endswith("p <.001 / <.001 *")
