"""`accord constitution`: rows for SFT, and preferences by the principle that was drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.constitution import FIGURES, ROWS, run_constitution
from cluster.contracts.config.constitution import ConstitutionConfig
from cluster.contracts.config.file import check_config
from cluster.contracts.errors import BadReward, UserError
from cluster.runs.console import Reporter
from learner.offline.datasets import read_demonstrations
from reward_service.preferences.store import PreferenceStore
from tests.judge_endpoint import JudgeEndpoint, judge_endpoint, longer, shown

PRINCIPLES = "# Mine\n\n- Be kind.\n- Be\n  brief.\n\nThis explains.\n"


def polite(body: dict[str, Any]) -> str:
    """Criticises, says please, and prefers what is longer."""
    words = body["messages"][0]["content"]
    if '"critique"' in words:
        return json.dumps({"critique": f"rude: {shown(body, 'COMPLETION')}"})
    if '"revision"' in words:
        assert shown(body, "CRITIQUE").startswith("rude")
        return json.dumps({"revision": f"please, {shown(body, 'COMPLETION')}"})
    return longer(body)


def completions(path: Path) -> str:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {n}"}],
            "completion": [{"role": "assistant", "content": text * (n + 1)}],
        }
        for n in range(3)
        for text in ("go", "leave")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def constitution(
    endpoint: JudgeEndpoint, folder: Path, name: str = "r", **settings: Any
) -> tuple[Path, dict[str, Any]]:
    (folder / "c.md").write_text(PRINCIPLES, encoding="utf-8")
    tree = {
        "run": {"dir": str(folder / "runs"), "name": name, "seed": 3},
        "principles": str(folder / "c.md"),
        "data": {"path": completions(folder / "completions.jsonl")},
        "store": str(folder / "p.db"),
        "judge": {"base_url": endpoint.url, "model": "m", "cache": str(folder / "cache.db")},
        **settings,
    }
    run = run_constitution(check_config(ConstitutionConfig, tree, where="t"), Reporter(quiet=True))
    return run, json.loads((run / FIGURES).read_text("utf-8"))


def test_completions_are_revised_and_compared_by_principles(tmp_path: Path) -> None:
    with judge_endpoint(polite) as endpoint:
        run, figures = constitution(endpoint, tmp_path, revisions=2)
        asked = len(endpoint.bodies)
        _, again = constitution(endpoint, tmp_path, "again", revisions=2)
        assert len(endpoint.bodies) == asked  # all from the cache and the store
    assert figures["principles"] == ["Be kind.", "Be brief."]
    rows = [json.loads(line) for line in (run / ROWS).read_text("utf-8").splitlines()]
    assert len(rows) == 6
    for row in rows:
        before = row["metadata"]["before"]
        assert row["completion"][0]["content"] == f"please, please, {before}"
        assert set(row["metadata"]["principles"]) == {"Be kind.", "Be brief."}
        assert row["metadata"]["critiques"][0] == f"rude: {before}"
    stored = PreferenceStore(tmp_path / "p.db").judgements()
    assert len(stored) == 3
    assert {entry.source for entry in stored} == {"ai"}
    principles = {entry.criteria["asked"] for entry in stored}
    assert principles <= {"Be kind.", "Be brief."}
    assert figures["prefer"]["judged"] == 3
    assert (again["prefer"]["judged"], again["prefer"]["judged_before"]) == (0, 3)
    assert again["revise"] == figures["revise"] == {"completions": 6, "unchanged": 0}


def test_the_rows_are_what_sft_reads(tmp_path: Path) -> None:
    with judge_endpoint(polite) as endpoint:
        run, _ = constitution(endpoint, tmp_path, steps=["revise"], store=None)
    assert len(read_demonstrations(str(run / ROWS), "train").items) == 6
    assert not (tmp_path / "p.db").exists()


def test_a_pair_is_asked_about_by_the_principle_that_its_judgement_names(tmp_path: Path) -> None:
    with judge_endpoint(polite) as endpoint:
        constitution(endpoint, tmp_path, steps=["prefer"])
    store = PreferenceStore(tmp_path / "p.db")
    for entry in store.judgements():
        item = store.item(entry.item_id)
        assert item is not None
        texts = {candidate.text for candidate in item.completions}
        words = [
            body["messages"][0]["content"]
            for body in endpoint.bodies
            if {shown(body, "COMPLETION A"), shown(body, "COMPLETION B")} == texts
        ]
        assert len(words) == 2
        assert all(f"Criteria: {entry.criteria['asked']}" in text for text in words)


def test_a_revision_that_is_none_is_an_error(tmp_path: Path) -> None:
    with (
        judge_endpoint(lambda body: '{"critique": "  "}') as endpoint,
        pytest.raises(BadReward, match="no usable answer about completion"),
    ):
        constitution(endpoint, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("mine.md", "Only text.\n", "holds no principle"),
        ("c.toml", "principles = [1]", "not a list of texts"),
        ("c.toml", "principles = [", "not valid TOML"),
        ("none.md", None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_constitution(
    tmp_path: Path, name: str, text: str | None, problem: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with judge_endpoint(polite) as endpoint, pytest.raises(UserError, match=problem):
        constitution(endpoint, tmp_path, principles=str(tmp_path / name))
