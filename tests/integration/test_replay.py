"""An asynchronous run with the real vLLM, replayed by the learner alone: the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def line(command_lines: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = command_lines(tmp_path_factory.mktemp("replay"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def run(world: Any, line: Any) -> Path:
    """Twelve steps, at most three behind."""
    config = world.train_toml(
        line.folder / "c.toml",
        'type = "rules"\nmax_words = 3\nrepetition = true',
        batch="prompts_per_step = 2\nsamples_per_prompt = 3\nsteps = 12",
        rollout='engine = "vllm"\nmax_tokens = 24\nkv_on_swap = "keep"',
        staleness="bound = 3",
        learner="lr = 3e-3\nminibatches = 2",
        checkpoint="every = 5",
        logging="ray_metrics = false\ntensorboard = false",
    )
    command = line.run("train", config, timeout_s=200)
    assert command.process.returncode == 0, command.stderr
    return Path(line.folder) / "runs" / "r"


def test_an_asynchronous_run_replays_bit_for_bit(line: Any, run: Path) -> None:
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["async/staleness_max"] for row in rows) >= 2  # else this would say little
    command = line.run("replay", run, "--verify", timeout_s=100)
    assert command.process.returncode == 0, command.stderr
    assert "r: 12 steps" in command.stdout
    assert "the weights after every step and the policy equal the run's" in command.stdout
    assert not command.used_ray


def test_a_flipped_bit_in_one_file_is_named(line: Any, run: Path) -> None:
    path = run / "rollouts" / "step-000007.parquet"
    intact = path.read_bytes()
    schema = pq.read_schema(path)
    tokens = pq.ParquetFile(path).metadata.row_group(0).column(schema.names.index("token_ids"))
    damaged = bytearray(intact)
    damaged[tokens.data_page_offset + tokens.total_compressed_size // 2] ^= 1
    path.write_bytes(damaged)
    try:
        command = line.run("replay", run, "--verify", timeout_s=100)
    finally:
        path.write_bytes(intact)
    assert command.process.returncode == 1
    assert command.stderr.count("accord: ") == 1
    assert "step 7: step-000007.parquet is damaged" in command.stderr
    assert "Traceback" not in command.stderr
