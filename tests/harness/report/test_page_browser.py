"""The report page in a real browser: it sorts, filters, opens records, fits a phone, and logs no error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.report import build_leaderboard
from harness.report.page import write_page
from harness.store import Store

pytestmark = pytest.mark.browser

sync_api = pytest.importorskip("playwright.sync_api")

REFERENCE = Path(__file__).parents[3] / "results" / "reference"
SCREENSHOTS = os.environ.get("SCREENSHOTS")
"""Folder that keeps the pictures, to look at."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    page, *_ = write_page(build_leaderboard(Store(REFERENCE)), folder)
    return page.as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened offline; at the end nothing was logged and nothing asked of a network."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: troubles.append(request.url) if request.url != address else None)
    page.goto(address)
    yield page
    assert [trouble for trouble in troubles if not trouble.startswith((address, "data:"))] == []
    context.close()


def picture(page: Any, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"), full_page=True)


def column(page: Any, heading: str) -> list[str]:
    headings = page.locator("table.leaderboard thead th").all_inner_texts()
    index = next(i for i, text in enumerate(headings) if text.strip(" ▲▼").startswith(heading))
    return page.locator(f"table.leaderboard tbody tr:visible > :nth-child({index + 1})").all_inner_texts()


def test_a_heading_sorts_both_ways_by_mouse_and_by_keyboard(page: Any) -> None:
    heading = page.get_by_role("button", name="params M")
    heading.click()
    falling = [float(text.replace(",", "")) for text in column(page, "params M") if text != "–"]
    assert falling == sorted(falling, reverse=True)
    assert heading.locator("..").get_attribute("aria-sort") == "descending"
    heading.focus()
    page.keyboard.press("Enter")
    rising = [float(text.replace(",", "")) for text in column(page, "params M") if text != "–"]
    assert rising == falling[::-1]
    assert column(page, "params M")[-1] == "–"
    picture(page, "sorted")


def test_filters_leave_what_was_asked_for(page: Any) -> None:
    page.get_by_label("Sparsity").select_option("40%")
    assert set(column(page, "sparsity")) == {"40%", "–"}
    page.get_by_role("searchbox", name="Method").fill("flap")
    assert column(page, "method") == ["flap"]
    assert page.locator("output").inner_text() == "1 rows"
    page.get_by_role("searchbox", name="Method").fill("no such method")
    assert column(page, "method") == []
    page.get_by_role("searchbox", name="Method").fill("")
    page.get_by_label("Sparsity").select_option("all")
    assert len(column(page, "method")) == 14
    picture(page, "all")


def test_a_row_leads_to_its_record(page: Any) -> None:
    link = page.locator("table.leaderboard tbody tr", has_text="slicegpt").first.locator("a").first
    run = link.get_attribute("href")
    link.click()
    record = page.locator(f"[id='{run[1:]}']")
    assert record.get_attribute("open") is not None
    assert '"weights_sha256"' in record.inner_text()
    assert record.locator("summary").is_visible()


def test_it_fits_a_phone_and_prints(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    picture(page, "phone")
    page.emulate_media(media="print")
    assert not page.locator(".filters").is_visible()
    page.set_viewport_size({"width": 1000, "height": 1400})
    picture(page, "print")


def test_every_control_has_a_name_and_text_stands_out(page: Any) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, a, select, input, [role=img], [role=region]")].filter((e) =>
             !(e.textContent.trim() || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") ||
               (e.labels && e.labels.length))).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    contrasts = page.evaluate(
        """() => {
             const light = (c) => c.map((v) => v / 255)
               .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
               .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
             const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
             const ground = (e) => { for (; e; e = e.parentElement) {
               const c = rgb(getComputedStyle(e).backgroundColor);
               if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
             return [...document.querySelectorAll("p, a, th, td, li, label, figcaption, summary, button, output")]
               .filter((e) => e.textContent.trim()).map((e) => {
                 const [a, b] = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(ground(e))];
                 return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); });
           }"""
    )
    assert min(contrasts) >= 4.5
