"""Generation of a rollout worker against plain vLLM on the same prompts, on one core.

plain    vLLM's own `LLMEngine` loop: add all requests, step until done, outputs thrown away
engine   the same with the loop that Accord's worker puts in vLLM's place
worker   Accord's rollout worker: assignments in; completions, scores over gRPC, Arrow tables out

Each is a process of its own on core 0, in the order plain, engine, worker, worker, engine, plain,
... The figure is tokens per CPU-second of the process (the machine may be shared), and the ratio of
the medians.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

from cluster.measure.bench.children import answer, run, timed
from cluster.measure.bench.common import BenchOptions, BenchResult

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, RUNNING = 96, 4, 24, 48, 64
KINDS = ("plain", "engine", "worker")


def measure(options: BenchOptions) -> BenchResult:
    """Ratio of tokens per CPU-second (and per second) of the worker to plain vLLM's."""
    from cluster.contracts.config.reward import RewardConfig, RulesSource
    from cluster.measure.bench.corpus import corpus
    from learner.models.tiny import fresh_model, train_tokenizer
    from reward_service.server import serve

    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(corpus(0, 500), 640, folder)
        fresh_model(tokenizer, folder, hidden=128, layers=4, heads=4, intermediate=384)
        with serve(RewardConfig(sources=[RulesSource(max_words=40)])) as server:
            for repeat in range(options.repeats):
                for kind in KINDS if repeat % 2 == 0 else reversed(KINDS):
                    task = {"kind": kind, "model": folder, "reward": server.address}
                    found[kind].append(run(__name__, task, f"the {kind} measurement"))
    return _result(found)


def _result(found: Mapping[str, list[dict[str, float]]]) -> BenchResult:
    rows: list[dict[str, Any]] = [
        {
            "": kind,
            "tokens/cpu-s": statistics.median(r["tokens"] / r["cpu_s"] for r in runs),
            "tokens/s": statistics.median(r["tokens"] / r["wall_s"] for r in runs),
            "cpu share": statistics.median(r["cpu_s"] / r["wall_s"] for r in runs),
        }
        for kind, runs in found.items()
    ]
    plain, engine, worker = rows
    return BenchResult(
        name="rollout",
        settings={"prompts": PROMPTS, "samples": SAMPLES, "prompt_tokens": PROMPT_TOKENS,
                  "answer_tokens": NEW_TOKENS, "running": RUNNING},
        rows=rows,
        ratios={
            "rate per cpu-second": worker["tokens/cpu-s"] / plain["tokens/cpu-s"],
            "rate per second": worker["tokens/s"] / plain["tokens/s"],
            "worker over engine, per cpu-second": worker["tokens/cpu-s"] / engine["tokens/cpu-s"],
        },
        tolerances={"rate per cpu-second": (0.9, float("inf"))},
    )  # fmt: skip


def measured(task: dict[str, Any]) -> dict[str, float]:
    """In the child: one of KINDS."""
    from actors.environment import prepare_environment
    from actors.settings import EngineSettings

    prepare_environment((0,))
    settings = EngineSettings(
        model_path=task["model"],
        max_tokens=NEW_TOKENS,
        stop_token_ids=(),
        max_model_len=PROMPT_TOKENS + NEW_TOKENS,
        max_running=RUNNING,
        seed=1,
    )
    if task["kind"] == "worker":
        return _worker(settings, task["reward"])
    return _engine(settings, plain=task["kind"] == "plain")


def _engine(settings: Any, plain: bool) -> dict[str, float]:
    from cluster.measure.bench.plain_vllm import generate, plain_engine, worker_engine

    engine = plain_engine(settings) if plain else worker_engine(settings)

    def requests(prompts: int) -> list[tuple[list[int], int]]:
        return [(_prompt_ids(n), NEW_TOKENS) for n in range(prompts) for _ in range(SAMPLES)]

    generate(engine, requests(4), "warm")
    return timed(lambda: generate(engine, requests(PROMPTS), "run"))


def _worker(settings: Any, reward: str) -> dict[str, float]:
    from actors.decoding import make_decoder
    from actors.environment import make_engine
    from actors.rollout import RolloutWorker, WorkerSettings
    from cluster.contracts.records import Assignment, Prompt
    from reward_service.client import RewardClient

    client = RewardClient([reward])
    client.connect()
    worker = RolloutWorker(
        lambda: make_engine("vllm", settings),
        make_decoder(settings),
        None,
        lambda: client,
        WorkerSettings(name="bench"),
    )
    worker.start()
    worker._version = 0  # the weights it was started from are the ones to measure

    def once(first: int, prompts: int) -> int:
        asked = [
            Prompt(id=str(n), messages=({"role": "user", "content": "?"},),
                   token_ids=tuple(_prompt_ids(n)))
            for n in range(prompts)
        ]  # fmt: skip
        worker.submit(
            [
                Assignment(group_id=first + n, prompt=prompt, samples=SAMPLES)
                for n, prompt in enumerate(asked)
            ]
        )
        tokens = done = 0
        while done < prompts:
            groups = worker.harvest(60.0).groups
            done += len(groups)
            tokens += sum(group.response_tokens for group in groups)
        return tokens

    once(10_000, 4)
    return timed(lambda: once(0, PROMPTS))


def _prompt_ids(number: int) -> list[int]:
    return [300 + (7 * number + 3 * place) % 300 for place in range(PROMPT_TOKENS)]


if __name__ == "__main__":
    answer(measured)
