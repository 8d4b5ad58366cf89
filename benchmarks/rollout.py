"""Generation of a rollout worker against plain vLLM on the same prompts, on one core.

    python benchmarks/rollout.py [--repeats 5] [--out benchmarks/results/rollout.json]

plain    vLLM's own `LLMEngine` loop: add all requests, step until done, outputs thrown away
worker   Accord's rollout worker: assignments in; completions, scores over gRPC, Arrow tables out

Each is a process of its own on core 0, in the order plain, worker, worker, plain, ... The figure is
tokens per CPU-second of the process (the machine may be shared), and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, RUNNING = 96, 4, 24, 48, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=["plain", "worker"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--reward", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run = plain if args.child == "plain" else worker
        print("RESULT " + json.dumps(run(args.model, args.reward)), flush=True)
        os._exit(0)  # vLLM's threads need not be waited for
    compare(args.repeats, args.out)


def compare(repeats: int, out: Path | None) -> None:
    from cluster.contracts.config import RewardConfig, RulesSource
    from learner.fresh import fresh_model, train_tokenizer
    from reward_service.helpdesk.demonstrations import corpus
    from reward_service.server import serve

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(corpus(0, 500), 640, folder)
        fresh_model(tokenizer, folder, hidden=128, layers=4, heads=4, intermediate=384)
        rewards = RewardConfig(sources=[RulesSource(max_words=40)])
        rows: dict[str, list[dict[str, float]]] = {"plain": [], "worker": []}
        with serve(rewards) as server:
            for repeat in range(repeats):
                order = ("plain", "worker") if repeat % 2 == 0 else ("worker", "plain")
                for kind in order:
                    rows[kind].append(child(kind, folder, server.address))
    report(rows, out)


def child(kind: str, model: str, reward: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", kind, "--model", model, "--reward", reward]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    sys.exit(f"{kind} failed:\n{done.stderr[-2000:]}")


def engine_settings(model: str) -> Any:
    from actors.environment import prepare_environment
    from actors.settings import EngineSettings

    prepare_environment((0,))
    return EngineSettings(
        model_path=model,
        max_tokens=NEW_TOKENS,
        stop_token_ids=(),
        max_model_len=PROMPT_TOKENS + NEW_TOKENS,
        max_running=RUNNING,
        seed=1,
    )


def prompt_ids(number: int) -> list[int]:
    return [300 + (7 * number + 3 * place) % 300 for place in range(PROMPT_TOKENS)]


def plain(model: str, reward: str) -> dict[str, float]:
    settings = engine_settings(model)
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    from actors.engine_vllm import _engine_args

    engine = LLMEngine.from_engine_args(_engine_args(settings))
    sampling = SamplingParams(
        temperature=1.0,
        max_tokens=NEW_TOKENS,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    def once(tag: str, prompts: int) -> int:
        for number in range(prompts):
            for sample in range(SAMPLES):
                request = {"prompt_token_ids": prompt_ids(number)}
                engine.add_request(f"{tag}/{number}/{sample}", request, sampling)
        tokens = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens += sum(len(choice.token_ids) for choice in output.outputs)
        return tokens

    once("warm", 4)
    return timed(lambda: once("run", PROMPTS))


def worker(model: str, reward: str) -> dict[str, float]:
    settings = engine_settings(model)
    from actors.environment import make_engine
    from actors.remote import make_decoder
    from actors.rollout import RolloutWorker, WorkerSettings
    from cluster.contracts.records import Assignment, Prompt
    from reward_service.client import RewardClient

    client = RewardClient([reward])
    client.connect()
    running = RolloutWorker(
        lambda: make_engine("vllm", settings),
        make_decoder(settings),
        None,
        client,
        WorkerSettings(name="bench"),
    )
    running.start()
    running._version = 0  # the weights it was started from are the ones to measure

    def once(first: int, prompts: int) -> int:
        running.submit(
            [
                Assignment(
                    group_id=first + number,
                    prompt=Prompt(
                        id=str(number),
                        messages=({"role": "user", "content": "?"},),
                        token_ids=tuple(prompt_ids(number)),
                    ),
                    samples=SAMPLES,
                )
                for number in range(prompts)
            ]
        )
        tokens = done = 0
        while done < prompts:
            groups = running.harvest(60.0).groups
            done += len(groups)
            tokens += sum(group.response_tokens for group in groups)
        return tokens

    once(10_000, 4)
    return timed(lambda: once(0, PROMPTS))


def timed(run: Any) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    return {
        "tokens": tokens,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }


def report(rows: dict[str, list[dict[str, float]]], out: Path | None) -> None:
    rates = {
        kind: {
            "tokens_per_cpu_s": statistics.median(r["tokens"] / r["cpu_s"] for r in found),
            "tokens_per_s": statistics.median(r["tokens"] / r["wall_s"] for r in found),
        }
        for kind, found in rows.items()
    }
    ratios = {key: rates["worker"][key] / rates["plain"][key] for key in rates["plain"]}
    print(f"{'':8} {'tok/cpu-s':>10} {'tok/s':>10}")
    for kind, rate in rates.items():
        print(f"{kind:8} {rate['tokens_per_cpu_s']:10.0f} {rate['tokens_per_s']:10.0f}")
    print(f"{'ratio':8} {ratios['tokens_per_cpu_s']:10.3f} {ratios['tokens_per_s']:10.3f}")
    if out is not None:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        record = {
            "benchmark": "rollout",
            "commit": commit.stdout.strip(),
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "date": time.strftime("%Y-%m-%d"),
            "rates": rates,
            "ratio": ratios,
            "runs": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
