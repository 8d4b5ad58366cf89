"""What comes from outside may be anything: each reader takes it or refuses it in its own words, and
what was good before is still there.

Run with `-s` for the table of what was tried, by reader, and how much of it was taken.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.contracts.config.base import RunConfig, folder_name
from cluster.contracts.config.file import dump_toml, read_toml
from cluster.contracts.errors import AccordError, BadReward, UserError
from cluster.contracts.records import GroupMeta, RunState
from cluster.contracts.rows.files import raw_rows
from cluster.runs.checkpoints import Checkpoints
from cluster.runs.control import CONTROL, ControlFile
from reward_service import wire
from reward_service.intake import Intake
from reward_service.proto import reward_pb2 as pb
from tests.checkpoint_files import write_checkpoint
from tests.pool_world import World, play

TRIED: Counter[tuple[str, str]] = Counter()
many = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["workers", "paused", "stop", "request", "reward_replicas", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
torn_json = json_values.map(json.dumps).flatmap(
    lambda text: st.integers(0, len(text)).map(lambda end: text[:end].encode())
)
contents = st.binary(max_size=200) | torn_json | json_values.map(lambda v: json.dumps(v).encode())


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    readers = sorted({reader for reader, _ in TRIED})
    lines = [f"{'reader':<24}{'tried':>8}{'taken':>8}{'refused':>9}"]
    for reader in readers:
        taken, refused = TRIED[reader, "taken"], TRIED[reader, "refused"]
        lines.append(f"{reader:<24}{taken + refused:>8}{taken:>8}{refused:>9}")
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


def attempt(reader: str, call: Callable[[], Any], *refusals: type[Exception]) -> Any:
    """The answer of ``call``, None when it is refused by one of ``refusals``; nothing else may be
    raised."""
    try:
        answer = call()
    except refusals:
        TRIED[reader, "refused"] += 1
        return None
    TRIED[reader, "taken"] += 1
    return answer


@many
@given(content=contents)
def test_a_control_file(tmp_path: Path, content: bytes) -> None:
    """The newest valid wish holds; a damaged file is an event and changes nothing."""
    events: list[str] = []
    (tmp_path / CONTROL).unlink(missing_ok=True)
    read = ControlFile(tmp_path, lambda kind, **detail: events.append(kind))
    (tmp_path / CONTROL).write_text('{"request": "a", "workers": 3}')
    assert read().workers == 3
    other = tmp_path / "other"
    other.write_bytes(content)
    other.replace(tmp_path / CONTROL)
    wishes = read()
    assert events in ([], ["control_ignored"])
    TRIED["control file", "refused" if events else "taken"] += 1
    if events:
        assert wishes.workers == 3
    assert read() == wishes


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=20)


@many
@given(
    name=names | names.map("step-{}".format) | st.integers().map("step-{}".format),
    content=contents,
    copied=st.booleans(),
)
def test_a_checkpoints_name_and_manifest(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, copied: bool
) -> None:
    """Beside a good checkpoint, a folder of any name with any manifest, or a copy of the good one:
    the good one is still what a run resumes from."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = Checkpoints(folder, lambda kind, **detail: None)
    staging = found.begin(7)
    state = RunState(step=7, version=7, next_group=7, prompts_total=9)
    good = found.commit(staging, write_checkpoint(staging, "7"), state, keep=2)
    other = folder / name
    if name not in ("", ".", "..", good.name) and len(name.encode()) < 200:
        if copied:
            shutil.copytree(good, other)
        else:
            other.mkdir()
            (other / "manifest.json").write_bytes(content)
    chosen = attempt("checkpoint folder", found.newest_good)
    assert chosen.path == good
    assert chosen.state.step == 7
    shutil.rmtree(folder)


scores = st.builds(
    pb.ItemScore,
    id=st.sampled_from(["a", "b", "c", ""]),
    value=st.floats(),
    parts=st.dictionaries(st.text(max_size=5), st.floats(), max_size=2),
    vetoes=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=2),
)
replies = st.builds(
    pb.ScoreResponse,
    request_id=st.sampled_from(["r", "r", "q", ""]),
    scorer_version=st.sampled_from(["v", "v", "w", ""]),
    scores=st.lists(scores, max_size=3)
    | st.tuples(scores, scores).map(lambda two: [_named(two[0], "a"), _named(two[1], "b")]),
)


def _named(score: pb.ItemScore, name: str) -> pb.ItemScore:
    score.id = name
    return score


@settings(max_examples=400, deadline=None)
@given(reply=replies)
def test_a_reward_services_reply(reply: pb.ScoreResponse) -> None:
    """Only the asked scores, each finite, of the scorer the run began with."""
    taken = attempt(
        "reward reply",
        lambda: wire.decode_reply(
            reply, request_id="r", ids=["a", "b"], version="v", service="host:1"
        ),
        BadReward,
    )
    if taken is not None:
        assert [score.id for score in reply.scores] == ["a", "b"]
        numbers = [n for score in taken for n in (score.value, *score.parts.values())]
        assert all(math.isfinite(n) and abs(n) <= wire.MAX_ABS_SCORE for n in numbers)


@settings(max_examples=400, deadline=None)
@given(
    data=st.binary(max_size=300)
    | st.builds(
        pb.ScoreRequest,
        request_id=st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        items=st.lists(
            st.builds(
                pb.Item,
                id=st.sampled_from(["a", "b", ""]),
                finish_reason=st.sampled_from(["stop", "length", ""]),
                messages=st.lists(st.builds(pb.Message), max_size=2),
                metadata_json=json_values.map(json.dumps) | st.just("{"),
            ),
            max_size=3,
        ),
    ).map(lambda request: request.SerializeToString())
)
def test_a_reward_services_request(data: bytes) -> None:
    """Refused or taken; the room that it asked for is there again."""
    intake = Intake(room=1)
    context = SimpleNamespace(cancel=lambda: None)
    read = attempt("reward request", lambda: intake.read(iter([data]), context, 1), wire.BadRequest)
    if read is not None:
        read.loan.end()
    fine = pb.Item(id="a", finish_reason="stop", messages=[pb.Message(role="user", content="q")])
    after = pb.ScoreRequest(request_id="r", items=[fine]).SerializeToString()
    assert intake.read(iter([after]), context, 0.1).items[0].id == "a"


@settings(max_examples=100, deadline=None)
@given(
    told=st.lists(
        st.tuples(st.integers(-1, 6), st.integers(-1, 2), st.sampled_from([None, "failed"])),
        max_size=12,
    )
)
def test_what_a_worker_says_it_finished(told: list[tuple[int, int, str | None]]) -> None:
    """Any group, any attempt, in any order, twice: each group that was leased comes out once."""

    async def scene(world: World) -> None:
        await world.start(1)
        world.submit(0, 1, 2, 3)
        await asyncio.sleep(0.5)
        worker = world.workers[0, 0]
        for group, attempt_, failure in told:
            worker._done.append(
                GroupMeta(
                    group_id=group, attempt=attempt_, samples=2, prompt_tokens=1,
                    response_tokens=5, version_min=0, version_max=0, failure=failure,
                )
            )  # fmt: skip
        await asyncio.sleep(2)
        refused = world.kinds().count("stale_result_refused")
        TRIED["worker's harvest", "refused"] += refused
        TRIED["worker's harvest", "taken"] += len(told) - refused
        worker.finish_all()
        await asyncio.sleep(2)
        assert sorted(world.finished()) == [0, 1, 2, 3]

    play(scene)


@many
@given(
    content=contents | st.text(st.characters(exclude_categories=["Cs"])).map(str.encode),
    kind=st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]),
    good_first=st.booleans(),
)
def test_a_file_of_rows(tmp_path: Path, content: bytes, kind: str, good_first: bool) -> None:
    """Rows or one message; a row that is damaged does not hide the good one before it."""
    file = tmp_path / f"rows.{kind}"
    good = {"jsonl": b'{"prompt": "fine"}\n', "csv": b"prompt\nfine\n", "tsv": b"prompt\nfine\n"}
    before = good.get(kind, b"") if good_first else b""
    file.write_bytes(before + content)
    rows: list[Any] = []

    def read() -> int:
        for row in raw_rows(str(file)):
            with_columns = attempt("row of a file", row.columns, AccordError)
            rows.append(with_columns)
        return len(rows)

    attempt("file of rows", read, UserError)
    if before and rows:
        assert rows[0] == {"prompt": "fine"} or kind != "jsonl"


@many
@given(
    name=st.text(max_size=30)
    | st.sampled_from(["..", ".", "a/b", "a\\b", "\x1b[31m", "x" * 300, "\ud800", "con\n"]),
    parents=st.dictionaries(st.text(max_size=8), st.text(max_size=12), max_size=3),
)
def test_a_runs_name_and_parents(tmp_path: Path, name: str, parents: dict[str, str]) -> None:
    """The name is one folder here, or refused; what is stored is read back as it was."""
    if attempt("run name", lambda: folder_name(name), ValueError) is not None and name:
        (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
        assert (tmp_path / "runs" / name).resolve().parent == (tmp_path / "runs").resolve()
    config = attempt("run parents", lambda: RunConfig(parents=parents), ValidationError)
    file = tmp_path / "config.toml"
    try:
        file.write_text(dump_toml(config), encoding="utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which no terminal or TOML file can hold
        return
    assert RunConfig(**read_toml(str(file))) == config
