"""The head of a Ray cluster that the run has joined is killed: the command ends as resumable, and
the run goes on with a new head."""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.same_run import (
    COMMAND_S,
    RULES,
    events,
    exact,
    rows,
    run_of,
    steps_done,
)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]

RAY = Path(sys.executable).with_name("ray")
START = (
    *("--head", "--block", "--num-cpus=8", "--object-store-memory=100000000"),
    *("--include-dashboard=false", "--disable-usage-stats"),
)
START_S = 120.0
log = logging.getLogger(__name__)


def own_ports() -> list[str]:
    """Those that two clusters of one machine would both take."""
    words = []
    for name in ("ray-client-server-port", "dashboard-agent-listen-port"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            words.append(f"--{name}={free.getsockname()[1]}")
    return words


@dataclass
class Head:
    """A cluster of this machine alone, whose head can be killed and started anew at its address."""

    folder: Path  # short: Ray's sockets lie below it
    seen: list[psutil.Process] = field(default_factory=list)
    address: str = ""

    def start(self) -> None:
        port = self.address.rpartition(":")[2] or "0"
        out = self.folder / "head.log"
        with out.open("wb") as file:
            block = subprocess.Popen(
                [RAY, "start", f"--port={port}", f"--temp-dir={self.folder}", *START, *own_ports()],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.seen.append(psutil.Process(block.pid))
        deadline = time.monotonic() + START_S
        while (found := re.search(r"--address='([\d.]+:\d+)'", out.read_text())) is None:
            assert block.poll() is None, out.read_text()
            assert time.monotonic() < deadline, out.read_text()
            time.sleep(0.2)
        self.address = found[1]
        self._note()

    def _note(self) -> list[psutil.Process]:
        """Processes of the cluster; those whose parents die meanwhile stay known."""
        for known in list(self.seen):
            with suppress(psutil.NoSuchProcess):
                self.seen += [
                    child for child in known.children(recursive=True) if child not in self.seen
                ]
        return self.seen

    def kill(self, names: tuple[str, ...]) -> None:
        """Those of the head's own processes whose names begin so."""
        killed = 0
        for process in self._note():
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith(names):
                    process.kill()
                    killed += 1
        assert killed >= len(names)

    def end(self) -> None:
        for process in self._note():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.seen, 10)
        self.seen.clear()


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    made = Head(Path(tempfile.mkdtemp(prefix="ray-")))
    try:
        made.start()
        yield made
    finally:
        made.end()
        shutil.rmtree(made.folder, ignore_errors=True)


# The second as when the head's machine were lost, but for the driver, which is on it.
@pytest.mark.parametrize("names", [("gcs_server",), ("gcs_server", "raylet")], ids=["gcs", "all"])
def test_the_head_is_killed_and_the_run_goes_on_with_a_new_one(
    world: Any, accord: Any, head: Head, names: tuple[str, ...]
) -> None:
    steps = 400
    config = world.train_toml(
        accord.folder / "c.toml",
        RULES,
        batch=f"prompts_per_step = 4\nsamples_per_prompt = 2\nsteps = {steps}",
        rollout='engine = "transformers"\nmax_tokens = 6\nworkers = 2',
        staleness="bound = 2",
        checkpoint="every = 3",
        cluster=f'address = "{head.address}"',
        logging="ray_metrics = false\ntensorboard = false\nsamples_every = 0",
    )
    command = accord.start("train", config)
    run = run_of(accord)
    command.wait_until(lambda: (run / "checkpoints" / "step-000003").exists(), 300, "a checkpoint")
    head.kill(names)
    killed = time.monotonic()
    assert command.wait(COMMAND_S) == 75, command.stderr
    log.info("ended %.1f s after the head was killed", time.monotonic() - killed)
    assert "the cluster's head is lost" in command.stderr
    assert f"accord train --resume {run}" in command.stderr
    assert events(accord, "head_lost")
    done = steps_done(accord)
    assert done < steps, "the run was over before"
    head.end()

    head.start()
    more = done + 3
    resumed = accord.run("train", "--resume", run, f"batch.steps={more}", timeout_s=COMMAND_S)
    assert resumed.process.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    assert max(row["step"] for row in rows(run / "metrics.jsonl")) == more
    exact(accord)
