"""One row of the benchmark of weight updates: a worker that generates while it is updated."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.measure.bench.children import answer
from cluster.measure.bench.weights import NEW_TOKENS, PROMPT_TOKENS, RUNNING

SAMPLES = 4  # of a prompt
SETS = 4  # of weights, sent in turn
BLOCKS = 5  # of quiet generation and generation with swaps, one after the other
TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}


def measured(task: dict[str, Any]) -> dict[str, float]:
    from actors.environment import prepare_environment

    prepare_environment((0,))
    with tempfile.TemporaryDirectory() as folder:
        load = Load(task)
        manifests, publish_s = publish(task, folder)
        versions = itertools.count()

        def update() -> Any:
            version = next(versions)
            chosen = dataclasses.replace(manifests[version % SETS], version=version)
            return load.worker.load_weights(chosen)

        update()
        load.begin()
        update()
        quiet, busy = [], []
        reports: list[Any] = []
        swaps = -(-task["swaps"] // BLOCKS)
        for _ in range(BLOCKS):
            quiet.append(load.counted(lambda: time.sleep(1.0)))
            load.swaps_begin()
            busy.append(load.counted(lambda: reports.extend(paced(update) for _ in range(swaps))))
        load.end()
        return {**row(load, quiet, busy, reports, task), "publish": round(publish_s * 1e3, 1)}


def paced(update: Callable[[], Any]) -> Any:
    report = update()
    time.sleep(0.05)
    return report


def publish(task: dict[str, Any], folder: str) -> tuple[list[Any], float]:
    """SETS of weights, each near the model's, and the median seconds that publishing one took."""
    import torch
    from transformers import AutoModelForCausalLM

    from cluster.weights.disk import DiskPublisher
    from cluster.weights.transports import publish as sent
    from learner.rl.publish import canary, host_arrays

    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    publisher = DiskPublisher(folder)
    manifests, seconds = [], []
    for version in range(SETS):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.002)
        check = canary(model, list(range(4, 36)), task["dtype"], TOLERANCE[task["dtype"]])
        began = time.perf_counter()
        arrays, dtypes = host_arrays(model, task["dtype"])
        manifests.append(sent(publisher, arrays, dtypes, version, check))
        seconds.append(time.perf_counter() - began)
    return manifests, statistics.median(seconds)


class Load:
    """A worker kept at RUNNING requests, with the times of its decode steps and swaps."""

    def __init__(self, task: dict[str, Any]) -> None:
        from actors.rollout import RolloutWorker, WorkerSettings
        from cluster.weights.disk import DiskReceiver

        self.steps: list[tuple[float, float]] = []
        self.swaps: list[tuple[float, float, float]] = []  # begin, end, CPU seconds
        self._task = task
        self._groups = itertools.count()
        self._closing = threading.Event()
        self._feeder = threading.Thread(target=self._feed)
        self._quiet_steps = 0
        self.worker = RolloutWorker(
            self._make_engine,
            lambda ids: [""] * len(ids),
            DiskReceiver(),
            Zeros,
            WorkerSettings(name="w"),
        )
        self.worker.start()

    def _make_engine(self) -> Any:
        from actors.environment import make_engine
        from actors.settings import EngineSettings

        engine: Any = make_engine(
            "vllm",
            EngineSettings(
                model_path=self._task["model"],
                dtype=self._task["dtype"],
                kv_on_swap=self._task["kv"],
                max_tokens=NEW_TOKENS,
                stop_token_ids=(),
                max_model_len=PROMPT_TOKENS + NEW_TOKENS,
                max_running=RUNNING,
            ),
        )
        step, swap = engine._llm.step, engine.swap

        def timed_step() -> Any:
            began = time.perf_counter()
            outputs = step()
            self.steps.append((began, time.perf_counter()))
            return outputs

        def timed_swap(version: int) -> None:
            began, cpu = time.perf_counter(), time.thread_time()
            swap(version)
            self.swaps.append((began, time.perf_counter(), time.thread_time() - cpu))

        engine._llm.step, engine.swap = timed_step, timed_swap
        return engine

    def begin(self) -> None:
        self._submit(2 * RUNNING // SAMPLES)
        self._feeder.start()
        time.sleep(0.5)

    def swaps_begin(self) -> None:
        """Forget the swaps before generation began and note which steps had none near."""
        self._quiet_steps = self._quiet_steps or len(self.steps)
        if len(self.swaps) <= 2:
            self.swaps.clear()

    def quiet_steps(self) -> list[float]:
        """Milliseconds of the steps before the first measured swap."""
        steps = self.steps[len(self.steps[: self._quiet_steps]) // 3 : self._quiet_steps]
        return [1e3 * (end - began) for began, end in steps]

    def end(self) -> None:
        self._closing.set()
        self._feeder.join(60)
        self.worker.stop()

    def counted(self, work: Callable[[], Any]) -> tuple[float, float, float]:
        """(tokens, CPU seconds, seconds) while ``work`` went on."""
        tokens, cpu, wall = self._tokens(), time.process_time(), time.perf_counter()
        work()
        spent = time.process_time() - cpu, time.perf_counter() - wall
        return (self._tokens() - tokens, *spent)

    def _tokens(self) -> int:
        """Sampled so far, of answers in the making too."""
        thread = self.worker._thread

        def count(engine: Any) -> int:
            scheduler = engine._llm.engine_core.engine_core.scheduler
            making = sum(request.num_output_tokens for request in scheduler.requests.values())
            return thread.generated_tokens + making

        return thread.call(count, 60.0, "count")

    def _feed(self) -> None:
        while not self._closing.is_set():
            done = len(self.worker.harvest(1.0).groups)
            self._submit(done)

    def _submit(self, groups: int) -> None:
        from cluster.contracts.records import Assignment, Prompt

        asked = []
        for number in itertools.islice(self._groups, groups):
            ids = tuple(4 + (7 * number + 3 * place) % 600 for place in range(PROMPT_TOKENS))
            prompt = Prompt(id=str(number), messages=({"role": "user", "content": "?"},),
                            token_ids=ids)  # fmt: skip
            asked.append(Assignment(group_id=number, prompt=prompt, samples=SAMPLES))
        self.worker.submit(asked)


class Zeros:
    """The cheapest scorer there is."""

    version = "zeros"

    def score(self, rollouts: Sequence[Any]) -> list[Any]:
        from cluster.contracts.records import Score

        return [Score(value=0.0, scorer_version=self.version) for _ in rollouts]


def row(
    load: Load,
    quiet: list[tuple[float, float, float]],
    busy: list[tuple[float, float, float]],
    reports: list[Any],
    task: dict[str, Any],
) -> dict[str, float]:
    """What the benchmark shows, to three digits; times in milliseconds."""
    pauses = stalls(load.steps, load.swaps)
    rate = sum(tokens for tokens, _, _ in quiet) / sum(cpu for _, cpu, _ in quiet)
    lost = sum(rate * cpu - tokens for tokens, cpu, _ in busy) / len(reports)
    extra = after_swap(load.steps, load.swaps)
    found = {
        "step": statistics.median(load.quiet_steps()),
        "step p99": quantile(load.quiet_steps(), 0.99),
        "pause": quantile(pauses, 0.5),
        "pause p99": quantile(pauses, 0.99),
        "pause max": max(pauses),
        "swap cpu p99": quantile([1e3 * cpu for _, _, cpu in load.swaps], 0.99),
        "next step": statistics.median(extra),
        "fetch": 1e3 * statistics.median(r.fetch_s for r in reports),
        "verify": 1e3 * statistics.median(r.verify_s for r in reports),
        "stage": 1e3 * statistics.median(r.stage_s for r in reports),
        "lost cpu": 1e3 * lost / rate,
        "lost tokens": lost,
        "canary": max(r.canary_logp_diff for r in reports) / TOLERANCE[task["dtype"]],
    }
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def stalls(
    steps: list[tuple[float, float]], swaps: list[tuple[float, float, float]]
) -> list[float]:
    """Milliseconds from the end of the step before each swap to the start of the one after."""
    found = []
    for began, ended, _ in swaps:
        before = max((end for _, end in steps if end <= began), default=began)
        after = min((start for start, _ in steps if start >= ended), default=ended)
        found.append(1e3 * (after - before))
    return found


def after_swap(
    steps: list[tuple[float, float]], swaps: list[tuple[float, float, float]]
) -> list[float]:
    """Milliseconds of the step after each swap: with "recompute" it fills the caches again."""
    return [
        1e3 * next((end - start for start, end in steps if start >= ended), 0.0)
        for _, ended, _ in swaps
    ]


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    answer(measured)
