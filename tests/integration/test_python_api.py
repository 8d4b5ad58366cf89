"""docs/python.md and more, run as a notebook runs its cells: one process, inside an event loop."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# As IPython: each cell is code of its own, its lines known to linecache, in a running loop.
NOTEBOOK = """
import asyncio, json, linecache, sys

names = {"__name__": "__main__"}

async def notebook():
    for number, cell in enumerate(json.load(open(sys.argv[1]))):
        file = f"<cell {number}>"
        linecache.cache[file] = (len(cell), None, cell.splitlines(True), file)
        exec(compile(cell, file, "exec"), names)

asyncio.run(notebook())
"""
SMALL = """
import accord
SMALL = {"batch": {"prompts_per_step": 2, "samples_per_prompt": 2}, "rollout.max_tokens": 6,
         "rollout.engine": "transformers", "cluster.object_store_mb": 80}

def length(completions, **columns):
    return [len(text) for text in completions]
"""


def notebook(folder: Path, *cells: str) -> subprocess.Popen[str]:
    (folder / "cells.json").write_text(json.dumps(cells))
    return subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK, "cells.json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], limit_s: float = 280) -> str:
    try:
        out, err = process.communicate(timeout=limit_s)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture
def folder(world: Any, tmp_path: Path) -> Path:
    (tmp_path / "my-model").symlink_to(world.policy)
    return tmp_path


def test_the_page_runs_as_a_notebook(folder: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    cells = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(cells) == 5
    # Another test's business is vLLM in training; here only accord.generate starts it.
    fast = '"rollout.max_tokens": 8, "rollout.engine": "transformers"'
    cells = [cell.replace('"rollout.max_tokens": 8', fast) for cell in cells]
    check = """
from pathlib import Path
assert rewards and len(rewards) == 3 and best.score <= 0 and best.step == 3
assert more.metrics[-1]["step"] < 6 and more.status == "finished"
assert any(event["kind"] == "stopped_by_callback" for event in more.events)
assert 0 <= verdict.evaluation["win_rate"] <= 1
assert (judge.reward_model_path / "model.safetensors").is_file() and direct.policy_path.is_dir()
assert sorted(p.name for p in Path("runs/tuned/inputs").iterdir()) == ["data.jsonl", "model"]
assert policy.config.vocab_size and its_tokenizer.eos_token_id is not None
print("all cells done")
"""
    assert "all cells done" in finished(notebook(folder, *cells, check))


def test_mistakes_show_the_users_line_and_an_interrupt_leaves_a_checkpoint(folder: Path) -> None:
    reward = """
def wrong(prompts, completions, **columns):
    scores = [1.0] * len(completions)
    return [score / 0 for score in scores]
"""
    mistakes = """
try:
    accord.train("my-model", ["how long", "does it"], wrong, steps=1, config=SMALL, quiet=True)
except accord.UserError as problem:  # tried before anything starts
    assert "at <cell 2>:4 `return [score / 0 for score in scores]`" in str(problem), problem
    print("reward: said")

def breaks(info):
    raise KeyError("my own mistake")

try:
    accord.train("my-model", ["how long", "does it"], length,
                 steps=500, config=SMALL, quiet=True, name="breaks", callbacks=[breaks])
except KeyError:
    run = accord.load_run("runs/breaks")
    assert run.status == "failed" and run.checkpoints, run.status
    print("callback: raised")
"""
    interrupted = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # as a notebook's kernel
def step(info):
    print("step", info.step, flush=True)
try:
    accord.train("my-model", ["how long", "does it"], length,
                 steps=5000, config=SMALL, quiet=True, name="long", callbacks=[step])
except KeyboardInterrupt:
    run = accord.load_run("runs/long")
    assert run.status == "interrupted" and run.checkpoints, run.status
    print("interrupted with a checkpoint")
"""
    # Ray's metrics thread outlives the second run: a destructor of C++ must not run beside it.
    destructor = "import ctypes\nctypes.CDLL(None).on_exit(ctypes.CDLL(None).abort, None)"
    process = notebook(folder, destructor, SMALL, reward, mistakes, interrupted)
    assert process.stdout is not None
    heard = ""
    for line in process.stdout:
        heard += line
        if line.startswith("step 2"):
            process.send_signal(signal.SIGINT)
            break
    out = heard + finished(process, 120)
    for said in ("reward: said", "callback: raised", "interrupted with a checkpoint"):
        assert said in out
