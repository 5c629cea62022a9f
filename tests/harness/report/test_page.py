"""The report page: one file that needs nothing else, whose every row leads to its record."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from harness.records import LayerWidths, Measure, ModelRef, RunRecord, TrainingSpec
from harness.report import build_leaderboard
from harness.report.page import to_latex, write_page
from harness.report.page.figures import pareto_front, side_by_side
from harness.report.page.latex import escaped
from harness.report.page.page import number_of
from harness.store import Store

REFERENCE = Path(__file__).parents[3] / "results" / "reference"


class Elements(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, attribute: str, tag: str | None = None) -> list[str]:
        return [a[attribute] or "" for t, a in self.found if attribute in a and tag in (None, t)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Elements]:
    """The reference run's page."""
    folder = tmp_path_factory.mktemp("page")
    write_page(build_leaderboard(Store(REFERENCE)), folder)
    return folder, Elements((folder / "index.html").read_text(encoding="utf-8"))


def test_the_page_needs_no_network_and_no_other_file(page: tuple[Path, Elements]) -> None:
    _, elements = page
    for name in ("src", "href", "xlink:href", "action"):
        outside = [v for v in elements.values(name) if not v.startswith(("#", "data:"))]
        assert outside == []
    assert "@import" not in "".join(elements.text)


def test_ids_are_unique_and_every_link_leads_somewhere(page: tuple[Path, Elements]) -> None:
    _, elements = page
    ids = Counter(elements.values("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    links = [v[1:] for name in ("href", "xlink:href") for v in elements.values(name) if v.startswith("#")]
    assert set(links) <= ids.keys()
    labels = [v for name in ("aria-labelledby", "for") for v in elements.values(name)]
    assert set(labels) <= ids.keys()


def test_every_row_leads_to_its_records_and_every_record_is_there(page: tuple[Path, Elements]) -> None:
    _, elements = page
    run_ids = {f"run-{run_id}" for run_id in Store(REFERENCE).run_ids()}
    assert {v[1:] for v in elements.values("href", "a") if v.startswith("#run-")} == run_ids
    assert set(elements.values("id", "details")) == run_ids
    shown = [json.loads(text) for text in elements.text if text.startswith("{\n")]
    assert len(shown) == len(run_ids)
    assert all(record["provenance"]["weights_sha256"] for record in shown)


def test_figures_are_described_and_stand_beside_the_page_as_files(page: tuple[Path, Elements]) -> None:
    folder, elements = page
    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert names == {path.stem for path in (folder / "figures").glob("*.png")}
    kinds = ("size", "tasks", "widths")
    assert {f"smollm2-135m-{kind}" for kind in kinds} <= names
    assert sum("importance" in name for name in names) == 2
    assert len(elements.values("role", "svg")) == len(names)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (folder / "figures").glob("*.png"))


def test_the_page_repeats_byte_for_byte(page: tuple[Path, Elements], tmp_path: Path) -> None:
    folder, _ = page
    for path in write_page(build_leaderboard(Store(REFERENCE)), tmp_path):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes(), path


def test_several_trainings_are_tables_and_figures_of_their_own(
    store: Store, add_run: Callable[..., RunRecord], make_spec: Callable[..., object], tmp_path: Path
) -> None:
    add_run("dense", 0.0, 0.6)
    for method, p_right in (("flap", 0.5), ("slicegpt", 0.4)):
        record = add_run(method, 0.2, p_right)
        layers = tuple(LayerWidths(num_key_value_heads=3, intermediate_size=100 - i) for i in range(4))
        speed = Measure(name="efficiency/decode_tokens_per_second", value=10.0, unit="tokens/s", higher_is_better=True)
        timed = record.model_copy(update={"layers": layers, "measures": (*record.measures, speed)})
        store.write(timed, store.documents(record.spec.run_id))
        trained = add_run(method, 0.2, p_right + 0.05, recovery=TrainingSpec(tokens=100))
        told = {"training": {"heldout": [[50, 3.5], [100, 3.0 + p_right]]}}
        store.write(trained.model_copy(update={"trace": told}), store.documents(trained.spec.run_id))
    write_page(build_leaderboard(store), tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert text.count('<table class="leaderboard">') == 2
    assert "<option>Without training</option>" in text
    names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert names >= {f"smollm2-135m-{figure}" for figure in ("1-size", "1-latency", "1-widths", "2-size", "2-training")}
    assert "smollm2-135m-2-latency" not in names
    assert "Held-out loss at the end: flap at 20% 3.500, slicegpt at 20% 3.400." in text


def test_markup_in_names_is_text(store: Store, add_run: Callable[..., RunRecord], tmp_path: Path) -> None:
    for method in ("flap", "slicegpt"):
        add_run(method, 0.2, 0.5, model=ModelRef(name="<script>alert(1)"))
    write_page(build_leaderboard(store), tmp_path)
    assert "<script>alert" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_front_is_what_no_other_point_beats() -> None:
    points = [(1.0, 0.3), (2.0, 0.5), (2.0, 0.4), (3.0, 0.5), (4.0, 0.6), (0.5, 0.1)]
    front = pareto_front(points)
    assert front == [5, 0, 1, 4]
    rng = np.random.default_rng(0)
    cloud = [(float(x), float(y)) for x, y in rng.integers(0, 9, (60, 2))]
    found = {cloud[i] for i in pareto_front(cloud)}
    assert found == {p for p in cloud if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in cloud)}


def test_points_that_would_hide_each_other_stand_side_by_side() -> None:
    moved = side_by_side([100.0, 0.0, 50.0, 50.0, 50.1])
    assert moved[:2] == [100.0, 0.0]
    assert np.diff(moved[2:]) == pytest.approx([1.5, 1.5])
    assert np.mean(moved[2:]) == pytest.approx(np.mean([50.0, 50.0, 50.1]))
    assert side_by_side([3.0]) == [3.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48.1 [45.0, 51.2] †", 48.1),
        ("-3.2 [-5.0, -1.4]", -3.2),
        ("+0.4 [0, 1]", 0.4),
        ("1,234.5", 1234.5),
        ("–", None),
    ],
)
def test_cells_sort_by_the_number_they_begin_with(text: str, number: float | None) -> None:
    assert number_of(text) == number


def test_latex_holds_every_row_and_escapes_what_would_be_commands() -> None:
    leaderboard = build_leaderboard(Store(REFERENCE))
    text = to_latex(leaderboard)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 4  # scores, tasks, size, knobs
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert len(body.strip().splitlines()) == len(leaderboard.frame)
    assert r"\textbf{" in body
    assert not re.search(r"(?<!\\)[%&#_](?=\S)", body.replace(" & ", ""))
    assert escaped("a_b 5% & {x} † –") == r"a\_b 5\% \& \{x\} $^\dagger$ --"
