"""Engine and learner compute the same log-probabilities: the whole matrix, in one process.

    python tests/integration/parity_checks.py FOLDER     # writes FOLDER/parity.json
    python tests/integration/parity_checks.py --table    # prints the table of the largest errors

Paths: the engine's decode steps, the engine's prefill of prompt and answer together, the learner's
padded and packed forward, and its chunked and whole head. A cell is one engine batch: dtype x
temperature x answer length x batch x how the answers end, after two weight updates.

An answer of exactly n tokens that ends with the stop token is made without touching the
distribution (forbidding the stop token before n would change it): sample n tokens with a seed of
its own, call the last one its stop token if it did not occur before, and sample once more.

The engine gives prompt log-probabilities at temperature 1 only. For another one it is asked for
the whole vocabulary's, and log_softmax(logp / T) is taken of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from parity_paths import (
    BLOCK,
    LONGEST,
    VOCAB,
    Row,
    as_batch,
    decode,
    disturb,
    learner_paths,
    make_model,
    packing,
    prefill,
    start_engine,
)

from cluster.contracts.records import Completion
from cluster.machine.torch_state import prepare_torch
from learner.rl.publish import host_arrays

DTYPES = ("float32", "bfloat16")
TEMPERATURES = (0.7, 1.0)
LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, LONGEST)
BATCHES = (1, 8, 32)
PROMPT_LENGTHS = (BLOCK, 5, BLOCK + 9, BLOCK - 1, 1, BLOCK + 1, 17, 2 * BLOCK)
PAIRS = (
    ("decode", "padded"),
    ("decode", "packed"),
    ("decode", "prefill"),
    ("prefill", "padded"),
    ("padded", "packed"),
    ("whole head", "chunked head"),
)


def fresh_rows(count: int, first_seed: int) -> list[Row]:
    rows = []
    for place in range(count):
        length = PROMPT_LENGTHS[(place + first_seed) % len(PROMPT_LENGTHS)]
        # Every third one begins as the others do: its first block comes out of the prefix cache.
        salt = 0 if place % 3 == 0 else place
        prompt = tuple((5 + 11 * salt + 3 * j) % VOCAB for j in range(length))
        rows.append(Row(prompt, first_seed + place))
    return rows


def stoppable(engine: Any, rows: list[Row], length: int, temperature: float) -> list[Row]:
    """The same prompts with seeds under which the last of `length` tokens is one of a kind."""
    for _ in range(20):
        done = decode(engine, rows, length, temperature)
        fits = [c.token_ids[-1] not in c.token_ids[:-1] for c in done]
        if all(fits):
            break
        rows = [
            row if fit else Row(row.prompt, row.seed + 1000)
            for row, fit in zip(rows, fits, strict=True)
        ]
    return rows


def measure_cell(
    models: tuple[Any, Any],
    rows: list[Row],
    done: list[Completion],
    where: dict[str, Any],
    engine: Any,
) -> list[dict[str, Any]]:
    dtype, temperature = where["dtype"], where["temperature"]
    batch = as_batch(rows, done)
    paths = learner_paths(*models, batch, dtype, temperature)
    paths["decode"] = batch.behaviour_logp.values
    paths["prefill"] = prefill(engine, rows, done, temperature)
    out = [{**where, "pair": list(pair), **errors(*(paths[p] for p in pair))} for pair in PAIRS]
    if where["length"] > 1:  # would the matrix see a mistake? (a length of 1 has no neighbour)
        wrong = learner_paths(*models, batch, dtype, 0.85)["padded"]
        shifted = np.roll(paths["padded"], 1)
        for name, values in (("wrong temperature", wrong), ("off by one", shifted)):
            found = errors(paths["decode"], values)
            out.append({**where, "pair": ["decode", name], **found})
    return out


def errors(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """max and mean |Δ| in nats, and the mean probability ratio exp|Δ|."""
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    assert gap.size
    assert np.isfinite(gap).all()
    mult = float(np.exp(gap).mean())
    return {"max": float(gap.max()), "mean": float(gap.mean()), "mult": mult, "tokens": gap.size}


def measure_dtype(folder: Path, dtype: str) -> dict[str, Any]:
    model = make_model(folder / dtype)
    engine = start_engine(folder / dtype, dtype)
    for version in (0, 1):
        disturb(model, 0.02, 10 + version)
        engine.stage(host_arrays(model, dtype)[0].items(), version)
        engine.swap(version)
    models = (model, packing(model))
    cells: list[dict[str, Any]] = []
    ended = exactly = 0
    for number, (temperature, length, batch) in enumerate(
        (t, n, b) for t in TEMPERATURES for n in LENGTHS for b in BATCHES
    ):
        where = {"dtype": dtype, "temperature": temperature, "length": length, "batch": batch}
        rows = stoppable(engine, fresh_rows(batch, number), length, temperature)
        done = decode(engine, rows, length, temperature)
        assert {(len(c.token_ids), c.finish_reason) for c in done} == {(length, "length")}
        assert {s.version for c in done for s in c.versions} == {1}
        cells += measure_cell(models, rows, done, {**where, "end": "length"}, engine)
        rows = [Row(r.prompt, r.seed, c.token_ids[-1]) for r, c in zip(rows, done, strict=True)]
        done = decode(engine, rows, length, temperature)
        cells += measure_cell(models, rows, done, {**where, "end": "stop"}, engine)
        ended += batch
        exactly += sum(c.finish_reason == "stop" and len(c.token_ids) == length for c in done)
    found = {"stop_asked": ended, "stop_exact": exactly, "cached_tokens": engine.cached_tokens}
    found["shared"] = shared_prefix(engine)
    engine.close()
    return {"cells": cells, **found}


def shared_prefix(engine: Any) -> int:
    """Prompt tokens not computed again when eight samples of one new prompt come together."""
    before = engine.counters()["prefix_cached_tokens"]
    for sample in range(8):
        engine.submit(f"shared/{sample}", [7 + 5 * j % 300 for j in range(2 * BLOCK + 9)], None)
    deadline = time.monotonic() + 60
    while engine.unfinished:
        engine.step()
        assert time.monotonic() < deadline, "eight samples do not finish"
    return int(engine.counters()["prefix_cached_tokens"] - before)


def measure(folder: Path) -> dict[str, Any]:
    """{"cells": one entry per cell and pair, "rows": counts per dtype, "seconds"}"""
    prepare_torch()
    began = time.perf_counter()
    by_dtype = {dtype: measure_dtype(folder, dtype) for dtype in DTYPES}
    return {
        "cells": [cell for found in by_dtype.values() for cell in found["cells"]],
        "rows": {d: {k: v for k, v in f.items() if k != "cells"} for d, f in by_dtype.items()},
        "seconds": time.perf_counter() - began,
    }


def table(results: dict[str, Any]) -> str:
    """Per dtype, temperature and pair: the largest error, where it is, the mean, mean exp|Δ|."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        key = (cell["dtype"], cell["temperature"], " - ".join(cell["pair"]))
        groups.setdefault(key, []).append(cell)
    lines = [
        f"{'dtype':9} {'T':>4} {'pair':26} {'max |d|':>9} {'mean |d|':>9} {'exp|d|':>8} "
        f"{'tokens':>7}  worst cell"
    ]
    for (dtype, temperature, pair), cells in groups.items():
        worst = max(cells, key=lambda cell: float(cell["max"]))
        tokens = sum(cell["tokens"] for cell in cells)
        mean, mult = (sum(c[k] * c["tokens"] for c in cells) / tokens for k in ("mean", "mult"))
        lines.append(
            f"{dtype:9} {temperature:4} {pair:26} {worst['max']:9.2e} {mean:9.2e} {mult:8.5f} "
            f"{tokens:7}  {worst['length']} tokens, batch {worst['batch']}, {worst['end']}"
        )
    return "\n".join([*lines, f"{results['seconds']:.0f} s"])


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(table(measure(Path(folder))) + "\n")
        return
    results = measure(Path(sys.argv[1]))
    results["table"] = table(results)
    text = json.dumps(results, indent=1)
    (Path(sys.argv[1]) / "parity.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
