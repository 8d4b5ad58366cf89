"""The pages of `accord ui` in Chromium, on a phone and on a desktop."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.browser

WIDTHS = {"phone": 390, "desktop": 1280}
DEADLINE_MS = 60_000
STARTED = re.compile(r"(http://127\.0\.0\.1:\d+/)\?token=\S+")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_dirs: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_dirs.one_of_each(folder, "ppo-with-a-rather-long-name-of-many-words-and-no-space")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path, repo_root: Path) -> Iterator[str]:
    """Of a real `accord ui`, with its token."""
    process = subprocess.Popen(
        [sys.executable, "launch.py", "ui", str(folder), "--port", "0"],
        cwd=repo_root,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert STARTED.match(line), line
    yield line.strip()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


@dataclass
class Visit:
    """A tab, and what a page must not do in it."""

    page: Any
    origin: str
    amiss: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.amiss.append(f"error: {error}"))
        self.page.on("request", self._request)
        self.page.on("dialog", lambda dialog: self.amiss.append(f"dialog: {dialog.message}"))

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.amiss.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.origin, "data:")):
            self.amiss.append(f"request: {request.url}")

    def open(self, path: str) -> Any:
        answer = self.page.goto(self.origin + path.lstrip("/"), timeout=DEADLINE_MS)
        assert answer.status == 200, path
        wider = self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wider <= 0, f"{path} scrolls sideways by {wider} pixels"
        assert self.page.evaluate("window.broken") is None, path
        assert self.amiss == [], path
        return self.page


@pytest.fixture(params=WIDTHS)
def visit(request: pytest.FixtureRequest, chromium: Any, address: str) -> Iterator[Visit]:
    width = WIDTHS[request.param]
    context = chromium.new_context(viewport={"width": width, "height": 844})
    context.set_default_timeout(DEADLINE_MS)
    tab = Visit(context.new_page(), address.split("?")[0])
    tab.page.goto(address)
    assert "token" not in tab.page.url
    yield tab
    assert tab.amiss == []
    context.close()


def test_every_page_fits_and_loads_nothing_foreign(
    visit: Visit, keep_picture: Callable[..., None]
) -> None:
    for name, path in {
        "runs": "/",
        "live": "/run/live",
        "samples": "/samples/live",
        "events": "/events/live",
        "files": "/files/live",
        "compare": "/compare?run=first&run=second&run=live",
        "finished": "/run/first",
        "dead": "/run/gone",
        "torn": "/run/torn",
        "cut": "/run/cut",
        "stage": "/run/quick/ppo-with-a-rather-long-name-of-many-words-and-no-space",
        "hostile": "/run/hostile",
        "hostile-samples": "/samples/hostile",
        "hostile-samples-2": "/samples/hostile?page=2",
        "hostile-events": "/events/hostile",
        "hostile-pairs": "/samples/quick",
        "one-sample": "/sample/40/12/hostile",
    }.items():
        page = visit.open(path)
        width = page.viewport_size["width"]
        keep_picture(page, f"{name}-{width}", whole=name != "one-sample")
    shown = visit.open("/samples/hostile?find=hidden").inner_text("main")
    assert "⟨U+202E⟩001$" in shown


@pytest.mark.parametrize("visit", ["phone"], indirect=True)
def test_a_run_is_followed(visit: Visit, folder: Path, run_dirs: ModuleType) -> None:
    name = f"going-{visit.page.viewport_size['width']}"
    run = run_dirs.training(folder, name, steps=5)
    page = visit.open(f"/run/{name}")
    assert "step 5 of 60" in page.inner_text("#part-facts")
    run_dirs.add_step(run, 6)
    run.event("worker_lost", worker="worker-2", cause="its host was cut off")
    page.wait_for_selector("#part-facts >> text=step 6 of 60")
    page.wait_for_selector("#part-events >> text=its host was cut off")
    run_dirs.end(run, "finished")
    page.wait_for_selector("#part-facts >> text=finished")


@pytest.mark.parametrize("visit", ["desktop"], indirect=True)
def test_a_run_is_found_and_compared_with_the_keyboard_alone(visit: Visit) -> None:
    page = visit.open("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        about = page.evaluate(
            "(e => [e.name || '', e.value || '', e.textContent.trim(), "
            "getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        seen.append(about)
        if about[0] == "run" and about[1] in ("first", "second"):
            page.keyboard.press("Space")
        if about[2] == "Compare the chosen runs":
            break
    assert all(style != "none" for *_, style in seen), seen
    page.keyboard.press("Enter")
    page.wait_for_selector("h1 >> text=Comparison of 2 runs")
    chart = page.locator(".plot svg").first
    chart.focus()
    reading = page.locator(".reading").first
    for _ in range(20):  # a busy machine may still be loading the page's script
        page.keyboard.press("ArrowLeft")
        if re.search(r"step \d+: A [\d.-]+, B [\d.-]+", reading.inner_text()):
            break
        page.wait_for_timeout(500)
    else:
        pytest.fail(f"the chart says nothing: {reading.inner_text()!r}")


def test_light_and_dark_have_contrast(
    chromium: Any, address: str, keep_picture: Callable[..., None]
) -> None:
    for scheme in ("light", "dark"):
        context = chromium.new_context(viewport={"width": 1280, "height": 844}, color_scheme=scheme)
        tab = Visit(context.new_page(), address.split("?")[0])
        tab.page.goto(address)
        page = tab.open("/run/live")
        keep_picture(page, f"live-{scheme}")
        assert page.evaluate(CONTRAST) == [], scheme
        context.close()


def test_without_the_token_nothing_is_shown(chromium: Any, address: str) -> None:
    context = chromium.new_context()
    page = context.new_page()
    answer = page.goto(address.split("?")[0] + "run/live")
    assert answer.status == 401
    assert "live" not in page.inner_text("body")
    context.close()


# Texts whose contrast to what is behind them is under 4.5 (WCAG 2.2, 1.4.3), with their ratio.
CONTRAST = r"""() => {
  const rgb = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const c = rgb(getComputedStyle(at).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = new Set();
  for (const e of document.querySelectorAll("main *, header *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const ink = rgb(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.add(`${e.tagName}.${e.getAttribute("class")} ${ratio.toFixed(1)}`);
  }
  return [...found];
}"""
