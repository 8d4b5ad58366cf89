"""Chromium for the tests of this folder, which are marked `browser` and skipped without it.

Debian: `apt-get install chromium`. Elsewhere ACCORD_CHROMIUM names the program.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium_program() -> str | None:
    named = os.environ.get("ACCORD_CHROMIUM")
    found = (shutil.which(name) for name in ([named] if named else NAMES))
    return next((path for path in found if path), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A playwright browser; without a sandbox, which containers do not allow."""
    program = chromium_program()
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium, or name it in ACCORD_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def keep_picture() -> Callable[..., None]:
    """``keep_picture(page, name)`` writes NAME.png into the folder that ACCORD_SCREENSHOTS names,
    for people to look at, or nothing where it names none."""
    named = os.environ.get("ACCORD_SCREENSHOTS")

    def keep(page: Any, name: str, *, whole: bool = True) -> None:
        if named:
            page.screenshot(path=Path(named) / f"{name}.png", full_page=whole)

    return keep
