"""One file in the form of HH-RLHF, oddities included, through every command that reads rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORDS = ("battery", "screen", "hours", "broken")


def hh_rows() -> list[dict[str, str]]:
    def talk(number: int, answer: str) -> str:
        return f"\n\nHuman: how long {WORDS[number % 4]} {number}\n\nAssistant: {answer}"

    good = [{"chosen": talk(n, "hours"), "rejected": talk(n, "broken")} for n in range(24)]
    odd = [
        {"chosen": talk(90, "hours").lstrip(), "rejected": talk(90, "broken").lstrip()},
        {"chosen": talk(91, ""), "rejected": talk(91, "broken")},
        {"chosen": talk(92, "hours") + "\n\nHuman: thanks", "rejected": talk(92, "broken")},
    ]
    return [*good, *odd]


@pytest.fixture(scope="module")
def hh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows as they should be; one without the blank line, one with an empty answer, and, in line
    27, one that ends with a question and so holds no comparison."""
    path = tmp_path_factory.mktemp("hh") / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in hh_rows()))
    return path


FIT = "rows_per_step = 8\nmax_steps = 2\neval_fraction = 0.2"


@pytest.mark.parametrize("command", ["sft", "reward-model", "dpo"])
def test_offline_training_leaves_out_and_counts(
    command: str, hh: Path, world: Any, accord_here: Any
) -> None:
    config = world.offline_toml(accord_here.folder / "c.toml", hh, FIT)
    done = accord_here.run(command, config, "data.skip_bad_rows=true")
    assert done.code == 0, done.err
    run = accord_here.folder / "runs" / "r"
    assert json.loads((run / "fit.json").read_text())["rows_bad"] == 1
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (rows,) = (event for event in events if event["kind"] == "rows")
    assert rows["bad"] == 1
    assert rows["trained"] + rows["held_out"] == 26
    assert "left out 1 bad row" in done.err
    assert "hh.jsonl, line 27: column 'chosen' does not end with" in done.err


def test_preferences_are_imported(hh: Path, accord_here: Any) -> None:
    store = accord_here.folder / "p.db"
    refused = accord_here.run("preferences", "import", hh, store)
    assert refused.code == 2
    assert not store.exists()
    done = accord_here.run("preferences", "import", hh, store, "--skip-bad-rows")
    assert done.code == 0, done.err
    counts = json.loads(done.out)
    assert (counts["rows"], counts["items"], counts["bad_rows"]) == (26, 26, 1)


def test_all_are_prompts(hh: Path, world: Any, accord_here: Any) -> None:
    source = 'type = "rules"\nmax_words = 3'
    config = world.train_toml(accord_here.folder / "c.toml", source)
    done = accord_here.run("plan", config, f"data.prompts={hh}")
    assert done.code == 0, done.err
