"""New items from the newest policy: which prompts, which policy, and what a failure leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cluster.assembly.live_labelling import LiveSampling, _Child, next_prompts
from cluster.commands import preferences as command
from cluster.contracts.config.label import LabelConfig
from cluster.contracts.errors import AccordError, UserError
from reward_service.preferences.labelling import Labelling
from reward_service.preferences.records import prompt_hash
from reward_service.preferences.store import PreferenceStore

Make = Callable[..., LiveSampling]
preferences = get_command(command.preferences)


class Writer:
    """Stands for `accord generate`; `accord preferences choose` is the real one."""

    def __init__(self) -> None:
        self.calls: list[Sequence[str]] = []
        self.broken = ""

    def __call__(self, words: Sequence[str]) -> None:
        self.calls.append(words)
        if self.broken:
            raise AccordError(self.broken)
        if words[0] == "preferences":
            preferences(list(words[1:]), standalone_mode=False)
            return
        given = {name: words[at + 1] for at, name in enumerate(words) if name.startswith("--")}
        prompts = [json.loads(line) for line in Path(words[2]).read_text().splitlines()]
        rows = [
            {"prompt": row["prompt"], "completion": f"{words[1]} {given['--seed']} {n}"}
            for row in prompts
            for n in range(int(given["--samples"]))
        ]
        Path(given["--out"]).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    (path / "checkpoints" / "step-000009" / "policy").mkdir(parents=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"q{n}"}) + "\n" for n in range(5)))
    (path / "config.toml").write_text(f"[data]\nprompts = {json.dumps(str(prompts))}\n")
    return path


@pytest.fixture
def writer() -> Writer:
    return Writer()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(run: Path, tmp_path: Path, writer: Writer, said: list[str]) -> Make:
    def made(**live: Any) -> LiveSampling:
        live = {"policy": str(run), "prompts_per_round": 3, "ahead": 4, **live}
        choice = live.pop("choice", None)
        config = LabelConfig.model_validate({"store": "p.db", "live": live, "choice": choice})
        store = PreferenceStore(tmp_path / "p.db")
        return LiveSampling(config, Labelling(store), said.append, writer)

    return made


def test_a_round_adds_items_of_the_newest_policy(run: Path, make: Make, writer: Writer) -> None:
    live = make(temperature=0.7)
    assert live.round() == 3
    (run / "checkpoints" / "step-000010" / "policy").mkdir(parents=True)
    assert live.round() == 3
    store = live._labelling.store
    versions = [item.completions[0].policy_version for item in store.items()]
    assert versions == ["step 9"] * 3 + ["step 10"] * 3
    one = store.items()[0].completions[0]
    assert (one.run, one.sampling) == (
        str(run),
        {"temperature": 0.7, "max_tokens": 256, "seed": 0},
    )
    assert writer.calls[1][1] == str(run / "checkpoints" / "step-000010" / "policy")
    assert "6 items so far, the last 3 from step 10" in live.status()
    # What is newer is labelled first.
    first = live._labelling.next_item("somebody")
    assert first is not None
    assert first.completions[0].policy_version == "step 10"


def test_a_round_asks_only_about_the_chosen_pairs(make: Make, writer: Writer) -> None:
    live = make(choice={"strategy": "diversity", "count": 2, "mismatched": 0.5})
    assert live.round() == 2
    assert writer.calls[0][writer.calls[0].index("--samples") + 1] == "4"
    items = live._labelling.store.items()
    reasons = [item.chosen_by.strategy for item in items if item.chosen_by]
    assert sorted(reasons) == ["diversity", "mismatched"]
    assert {c.policy_version for item in items for c in item.completions} == {"step 9"}
    first = live._labelling.next_item("somebody")
    assert first == items[0], "in the order they were chosen"


def test_every_prompt_has_its_turn(make: Make) -> None:
    live = make()
    for _ in range(5):
        live.round()
    items = live._labelling.store.items()
    assert len(items) == 15
    assert {sum(i.messages == j.messages for j in items) for i in items} == {3}


def test_prompts_with_the_fewest_items_come_first() -> None:
    prompts = [({"role": "text", "content": str(n)},) for n in range(6)]
    known = {prompt_hash(prompts[n]): 1 for n in range(4)}
    assert {p[0]["content"] for p in next_prompts(prompts, known, 2, 0)} == {"4", "5"}
    orders = {tuple(p[0]["content"] for p in next_prompts(prompts, {}, 6, s)) for s in range(9)}
    assert len(orders) > 1


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_thread_keeps_items_waiting_and_no_more(
    make: Make, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.assembly.live_labelling.LOOK_EVERY_S", 0.01)
    live = make()
    live.start()
    until(lambda: live._labelling.progress().items == 6)
    live.stop()
    assert live._labelling.progress().items == 6
    assert len(writer.calls) == 2
    assert not live._thread.is_alive()


def test_somebody_with_nothing_left_gets_more(
    make: Make, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.assembly.live_labelling.LOOK_EVERY_S", 0.01)
    live = make(ahead=1)
    live.start()
    until(lambda: live._labelling.progress().items == 3)
    live.ask()
    until(lambda: live._labelling.progress().items == 6)
    live.stop()
    assert len(writer.calls) == 2


def test_a_failure_is_told_and_the_thread_goes_on(
    make: Make, writer: Writer, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.assembly.live_labelling.AFTER_FAILURE_S", 0.01)
    writer.broken = "no memory left"
    live = make()
    live.start()
    until(lambda: len(writer.calls) > 2)
    assert "no memory left" in said[0]
    writer.broken = ""
    until(lambda: live._labelling.progress().items >= 3)
    live.stop()


def test_a_policy_that_repeats_itself_is_an_error(make: Make, tmp_path: Path) -> None:
    live = make()

    def same(words: Sequence[str]) -> None:
        rows = [{"prompt": "q0", "completion": "always this"}] * 2
        Path(words[4]).write_text("".join(json.dumps(row) + "\n" for row in rows))

    live._accord = same
    with pytest.raises(UserError, match="same completion"):
        live.round()


def test_a_run_without_prompts_or_policy_is_refused(run: Path, make: Make, tmp_path: Path) -> None:
    (run / "config.toml").unlink()
    with pytest.raises(UserError, match="which prompts"):
        make()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="without a policy"):
        make(policy=str(tmp_path / "empty"))


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(AccordError, match="no-such-command"):
        _Child().run(["no-such-command"])


def test_no_child_begins_when_the_page_is_stopped() -> None:
    child = _Child()
    child.stop()
    with pytest.raises(AccordError, match="being stopped"):
        child.run(["generate"])
