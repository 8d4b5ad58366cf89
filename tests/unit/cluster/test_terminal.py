"""Whatever a model, a prompt or a file's name holds, a terminal shows it and does not obey it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

import launch
from cluster.contracts.errors import UserError
from cluster.contracts.samples import SampleInfo
from cluster.runs.console import Reporter, result
from cluster.runs.sample_text import sample_lines, table_lines

# Colour, a title, clearing the screen, a link, C1 codes, turned direction, a bell, rich's markup.
HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07\x1b[2J\x1b]8;;http://x\x1b\\link\x9b5m\u202eback\u2066\x08\x7f\r"
    "[red]markup[/red][/nothing][link=http://x]"
)
MARKUP = "[red]markup[/red][/nothing]"


def assert_harmless(text: str) -> None:
    assert [c for c in text if not c.isprintable() and c not in "\n\t"] == []
    assert MARKUP in text


def sample() -> SampleInfo:
    return SampleInfo(
        step=1,
        group=0,
        sample=0,
        prompt_id="p",
        prompt=({"role": "user", "content": HOSTILE},),
        completion=HOSTILE,
        score=1.0,
        parts={},
        vetoes=(HOSTILE,),
        tokens=3,
        finish_reason="stop",
        versions=(0, 0),
    )


def test_results_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    result("\n".join(sample_lines("best", sample())))
    assert_harmless(capsys.readouterr().out)
    result("\n".join(table_lines([("best", sample())], 400)))
    assert_harmless(capsys.readouterr().out)


def test_progress_and_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for live in (False, True):
        reporter = Reporter()
        out = io.StringIO()
        reporter._console = Console(
            file=out, force_terminal=live, highlight=False, markup=False, color_system=None,
            width=400, legacy_windows=False,
        )  # fmt: skip
        reporter.live = live
        reporter.say(HOSTILE)
        with reporter.stage(MARKUP, 2) as stage:
            stage.update(1, {})
        said = out.getvalue()
        assert MARKUP in said
        assert "\x1b[31m" not in said
        assert "\x1b]" not in said
        assert "\u202e" not in said


def test_an_error_that_quotes_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> None:
        raise UserError(HOSTILE, where=HOSTILE, fix=HOSTILE)

    monkeypatch.setattr(launch, "app", fail)
    monkeypatch.setattr("sys.argv", ["accord"])
    with pytest.raises(SystemExit) as ended:
        launch.main()
    assert ended.value.code == 2
    assert_harmless(capsys.readouterr().err)
