"""`accord preferences` as a user calls it: from other tools' files to a reward model and back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from reward_service.preferences.records import Candidate, Gold, Item, Judgement, derived_id
from reward_service.preferences.store import PreferenceStore
from tests.integration.conftest import write_rows

GOOD, BAD = "hours", "broken"
FIT = "rows_per_step = 8\nmax_steps = 14\neval_fraction = 0.25\nlr = 3e-3\nmax_tokens = 128"


def hh_row(number: int) -> dict[str, str]:
    talk = f"\n\nHuman: how long battery {number}\n\nAssistant: "
    return {"chosen": f"{talk}{GOOD} {number % 7}", "rejected": f"{talk}{BAD} {number % 5}"}


def ultrafeedback_row(number: int) -> dict[str, Any]:
    texts = [f"{GOOD} {number % 7}", f"{BAD} {number % 5}", f"{BAD} screen", f"{GOOD} screen"]
    scores = [8.0, 2.5, 2.5, 7.0]
    order = random.Random(number).sample(range(4), 4)
    return {
        "source": "test",
        "instruction": f"how long battery {number}",
        "models": ["m"] * 4,
        "completions": [
            {"model": f"m{place}", "response": texts[place], "overall_score": scores[place]}
            for place in order
        ],
    }


@pytest.mark.parametrize("make", [hh_row, ultrafeedback_row])
def test_a_file_of_another_project_becomes_a_reward_model(
    make: Any, world: Any, accord_here: Any
) -> None:
    """One command from the file to held-out accuracy."""
    data = write_rows(accord_here.folder / "rows.jsonl", [make(n) for n in range(40)])
    config = world.offline_toml(accord_here.folder / "c.toml", data, FIT)
    done = accord_here.run("reward-model", config)
    assert done.code == 0, done.err
    figures = json.loads((accord_here.folder / "runs" / "r" / "reward_model.json").read_text())
    assert figures["pairs_held_out"] >= 6
    assert figures["accuracy"] > 0.9


@pytest.mark.parametrize("make", [hh_row, ultrafeedback_row])
def test_a_malformed_row_is_named_and_nothing_is_imported(make: Any, accord_here: Any) -> None:
    rows = [make(n) for n in range(5)]
    column = "chosen" if "chosen" in rows[3] else "completions"
    rows[3][column] = 7
    data = write_rows(accord_here.folder / "rows.jsonl", rows)
    store = accord_here.folder / "p.db"
    done = accord_here.run("preferences", "import", data, store)
    assert done.code == 2
    assert "rows.jsonl, line 4" in done.err
    assert f"'{column}'" in done.err
    assert not store.exists()


def made_store(path: Path) -> PreferenceStore:
    """24 items; ann judges all, bob the first twelve, differing in every fourth, and he writes a
    rationale."""
    store = PreferenceStore(path)
    items = [
        Item(
            id=f"i{n}",
            messages=({"role": "user", "content": f"how long battery {n}"},),
            completions=(Candidate(text=f"{GOOD} {n}"), Candidate(text=f"{BAD} {n}")),
            source="test",
            license="MIT",
            created_at="2026-01-02T03:04:05+00:00",
            gold=Gold(ranks=(1, 2)) if n == 23 else None,
        )
        for n in range(24)
    ]
    judgements = [
        Judgement(
            id=derived_id(item.id, who),
            item_id=item.id,
            annotator_id=who,
            answer="ranking",
            ranks=(2, 1) if who == "bob" and n % 4 == 0 else (1, 2),
            rationale="as bob thinks" if who == "bob" else "",
            shown_order="ab" if n % 2 else "ba",
            consent="c1",
            created_at="2026-01-02T03:04:05+00:00",
        )
        for n, item in enumerate(items)
        for who in (("ann", "bob") if n < 12 else ("ann",))
    ]
    store.add(items, judgements)
    return store


def test_from_labels_to_a_model_and_forgetting_an_annotator(world: Any, accord_here: Any) -> None:
    folder = accord_here.folder
    made_store(folder / "p.db")
    snapshot = accord_here.run(
        "preferences", "snapshot", folder / "p.db", folder / "labels-1", "--json",
        "snapshot.test_fraction=0", "quality.min_labels=20", "quality.min_gold=0.9",
    )  # fmt: skip
    assert snapshot.code == 0, snapshot.err
    sha256 = json.loads(snapshot.out)["sha256"]
    fit = FIT.replace("max_steps = 14", "max_steps = 2")
    config = world.offline_toml(folder / "c.toml", folder / "labels-1", fit)
    done = accord_here.run("reward-model", config)
    assert done.code == 0, done.err
    run = folder / "runs" / "r"
    assert json.loads((run / "manifest.json").read_text())["snapshot"] == sha256

    forgotten = accord_here.run(
        "preferences", "forget", folder / "p.db", "--annotator", "bob", "--runs", folder / "runs"
    )
    assert forgotten.code == 0, forgotten.err
    stone = json.loads(forgotten.out)
    assert (stone["kind"], stone["judgements"]) == ("annotator", 12)
    assert [use["sha256"] for use in stone["snapshots"]] == [sha256]
    assert stone["models"] == [str(run.resolve())]

    again = accord_here.run("preferences", "snapshot", folder / "p.db", folder / "labels-2")
    assert again.code == 0, again.err
    assert accord_here.run("preferences", "export", folder / "p.db", folder / "e.jsonl").code == 0
    assert "bob" not in (folder / "e.jsonl").read_text()
    assert b"bob" not in b"".join(p.read_bytes() for p in (folder / "labels-2").iterdir())
    audit = accord_here.run("preferences", "audit", folder / "p.db", "--personal-data")
    assert audit.code == 0, audit.err
    found = json.loads(audit.out)
    assert (found["problems"], found["personal_data"]) == ([], [])
    assert [stone["judgements"] for stone in found["tombstones"]] == [12]


def test_training_on_a_store_keeps_a_snapshot_in_the_run(world: Any, accord_here: Any) -> None:
    folder = accord_here.folder
    store = made_store(folder / "p.db")
    fit = FIT.replace("max_steps = 14", "max_steps = 1")
    config = world.offline_toml(folder / "c.toml", folder / "p.db", fit)
    assert accord_here.run("dpo", config).code == 0
    manifest = json.loads((folder / "runs" / "r" / "manifest.json").read_text())
    kept = json.loads((folder / "runs" / "r" / "snapshot" / "snapshot.json").read_text())
    assert manifest["snapshot"] == kept["sha256"]
    with store.database.reading() as db:
        assert [row["sha256"] for row in db.execute("SELECT * FROM snapshots")] == [kept["sha256"]]


def test_gates_hold_a_snapshot_back(accord_here: Any) -> None:
    folder = accord_here.folder
    made_store(folder / "p.db")
    (folder / "q.toml").write_text("[quality]\nmin_alpha = 0.9\nmin_labels = 10\n")
    words = [
        "preferences",
        "snapshot",
        folder / "p.db",
        folder / "s",
        "--config",
        folder / "q.toml",
    ]
    held = accord_here.run(*words, "--json")
    assert held.code == 1
    assert "the snapshot is held back: alpha is" in held.err
    assert "but must be at least 0.9 (quality.min_alpha)" in held.err
    gates = {gate["name"]: gate["passed"] for gate in json.loads(held.out)["gates"]}
    assert gates == {"min_labels": True, "min_alpha": False}
    assert not (folder / "s").exists()
    assert accord_here.run(*words, "quality.min_alpha=-0.5").code == 0
    manifest = json.loads((folder / "s" / "snapshot.json").read_text())
    assert [gate["passed"] for gate in manifest["gates"]] == [True, True]


def test_stats_duplicates_and_leaks(accord_here: Any) -> None:
    folder = accord_here.folder
    made_store(folder / "p.db")
    stats = json.loads(accord_here.run("preferences", "stats", folder / "p.db").out)
    assert (stats["labels"], stats["gold"]["share"]) == (36, 1.0)
    assert stats["agreement"]["percent_agreement"] == 0.75
    assert stats["annotators"]["bob"]["agrees_with_others"] == 0.75
    evaluation = write_rows(folder / "eval.jsonl", [{"prompt": "How long battery 3?"}])
    found = accord_here.run("preferences", "duplicates", folder / "p.db", "--against", evaluation)
    assert found.code == 1
    (leak, *_) = json.loads(found.out)["leaks"][str(evaluation)]
    assert leak["second"].endswith("eval.jsonl, line 1")
    assert leak["text"] == "how long battery 3"
    write_rows(evaluation, [{"prompt": "something else entirely"}])
    words = ["preferences", "duplicates", folder / "p.db", "--against", evaluation]
    assert accord_here.run(*words).code == 0


def test_forget_asks_for_one_thing(accord_here: Any) -> None:
    made_store(accord_here.folder / "p.db")
    for words in ([], ["--annotator", "ann", "--record", "i1"]):
        done = accord_here.run("preferences", "forget", accord_here.folder / "p.db", *words)
        assert done.code == 2
        assert "give one of --annotator, --record, --prompt" in done.err
