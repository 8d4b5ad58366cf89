"""The processes that a fit starts: they train with the first one, and none outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.contracts import errors
from cluster.contracts.config.offline import FitConfig, SftConfig
from cluster.contracts.errors import Fatal, PeerLost, Resumable, UserError
from learner.offline.companions import (
    Work,
    _loss,
    check_processes,
    companions,
    error_line,
    lead,
)

ROOT = Path(__file__).resolve().parents[4]


def config_of(policy: Path, folder: Path, **fit: Any) -> SftConfig:
    rows = [{"prompt": f"how {i} is the", "completion": " screen" * (i % 5 + 1)} for i in range(40)]
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    steps = {"rows_per_step": 8, "epochs": 10_000, "eval_fraction": 0.0, "threads": 1}
    return SftConfig.model_validate(
        {
            "model": {"path": str(policy)},
            "data": {"path": str(folder / "rows.jsonl")},
            "fit": {**steps, "processes": 2, "sharding": "fsdp2", "checkpoint_every": 2, **fit},
        }
    )


def own_companions() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [p for p in found if "learner.offline.companion" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.parallel
def test_a_companion_that_dies_ends_the_fit_and_it_can_go_on(
    tiny_policy: Path, tmp_path: Path
) -> None:
    config, run, killed = config_of(tiny_policy, tmp_path), tmp_path / "run", []
    run.mkdir()

    def on_step(step: int, part: float, numbers: Any) -> None:
        if step == 3:
            killed.extend(own_companions())
            killed[0].send_signal(signal.SIGKILL)

    with (
        pytest.raises(Resumable, match=r"process 1 .* killed by SIGKILL.* --resume"),
        companions(2, 1, run, lambda text: None) as meet,
    ):
        lead(Work("sft", config, run), meet, progress=on_step)
    assert len(killed) == 1
    assert own_companions() == []
    assert (run / "checkpoints" / "step-00000002").is_dir()
    # What is on disk is enough to go on, here with one process.
    told: list[int] = []
    alone = config_of(tiny_policy, tmp_path, processes=1, sharding="none")
    with companions(1, 1, run, lambda text: None) as meet:
        lead(
            Work("sft", alone, run),
            meet,
            progress=lambda step, part, numbers: told.append(step),
            should_stop=lambda: len(told) == 2,
        )
    assert told == [3, 4]


PARENT = """
import json, sys
from pathlib import Path
from cluster.contracts.config.offline import SftConfig
from learner.offline.companions import Work, companions, lead
run = Path(sys.argv[2])
config = SftConfig.model_validate(json.loads(sys.argv[1]))
with companions(2, 1, run, print) as meet:
    lead(Work("sft", config, run), meet, progress=lambda *told: (run / "begun").touch())
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parallel
def test_no_companion_outlives_a_first_process_that_is_killed(
    tiny_policy: Path, tmp_path: Path
) -> None:
    config, run = config_of(tiny_policy, tmp_path), tmp_path / "run"
    run.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, config.model_dump_json(), str(run)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: (run / "begun").exists() or parent.poll() is not None)
        companion = psutil.Process(parent.pid).children()
        assert len(companion) == 1
        parent.kill()
        wait_until(lambda: not companion[0].is_running() or zombie(companion[0]))
    finally:
        parent.kill()
        parent.wait(30)


def zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_until(true: Any, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def test_an_error_of_a_companion_arrives_as_what_it_is(tmp_path: Path) -> None:
    log = tmp_path / "process-1.log"
    log.write_text("Traceback\n  ...\nRuntimeError: out of memory\n", encoding="utf-8")
    told = UserError("is wrong", where="row 3", fix="mend it")
    found = _loss(1, 1, error_line(told), log)
    assert isinstance(found, UserError)
    assert (found.what, found.where, found.fix) == ("is wrong", "row 3", "mend it")
    for kind in (Fatal, PeerLost):
        raised = _loss(1, 1, error_line(kind("a reason")), log)
        assert (type(raised), str(raised)) == (kind, "a reason")
    silent = _loss(1, 1, b"", log)
    assert isinstance(silent, errors.Resumable)
    assert "ended with code 1" in str(silent)
    assert "RuntimeError: out of memory" in str(silent)
    assert "killed by SIGTERM" in str(_loss(1, -15, b'{"kind": "Fat', log))


def test_torchruns_number_of_processes_has_to_be_that_of_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_processes(FitConfig(processes=2))
    given = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    check_processes(FitConfig(processes=4))
    with pytest.raises(UserError, match=r"torchrun started 4 processes") as refused:
        check_processes(FitConfig(processes=2))
    assert "fit.processes=4" in refused.value.fix


def test_one_process_starts_no_others(tmp_path: Path) -> None:
    before = threading.active_count()
    with companions(1, 1, tmp_path, lambda text: None) as meet:
        assert (meet().size, own_companions()) == (1, [])
    assert threading.active_count() == before
