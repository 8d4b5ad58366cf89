"""The engine's part of the probe: real answers to the run's prompts, at the run's concurrency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import AccordError
from cluster.contracts.records import (
    Completion,
    Prompt,
    Rollout,
    RolloutGroup,
    Score,
    VersionSpan,
)
from cluster.contracts.rollout_table import to_table

FIRST_S, STEADY_S = 12.0, 6.0  # the longest a first batch and the steady state are watched
ANSWERS = "answers.arrow"


def probe_engine(config: TrainConfig, folder: Path, threads: int) -> dict[str, Any]:
    from actors.environment import choose_engine, make_engine, prepare_environment

    prepare_environment((), bool(config.rollout.gpus), threads)
    from actors.settings import engine_settings
    from cluster.assembly.prepare import context_length, prepare

    prepared = prepare(config)
    settings = engine_settings(
        config.model,
        config.rollout,
        prepared.stop_ids,
        config.data.max_prompt_tokens,
        context_length(config.model),
    )
    kind, _ = choose_engine(config.rollout.engine)
    began = time.perf_counter()
    engine = make_engine(kind, settings)
    flow = _Flow(engine, prepared.prompts, config)
    found: dict[str, Any] = {"engine": engine.name, "start_s": time.perf_counter() - began}
    found |= flow.first_batch()
    found |= flow.steady()
    found["stall_s"] = flow.stall(prepared)
    write_groups(folder / ANSWERS, _groups(flow.answers, prepared.tokenizer, config))
    return found


def task_slots(config: TrainConfig) -> int:
    """Samples one worker decodes at once: its seats, or fewer where the bound admits fewer."""
    batch = config.batch.prompts_per_step * config.batch.samples_per_prompt
    admitted = (config.staleness.bound + 1) * batch
    return max(1, min(config.rollout.max_running, admitted // config.rollout.workers))


class _Flow:
    """Requests of the run's prompts in the run's order, all samples of one after the other."""

    def __init__(self, engine: Any, prompts: Any, config: TrainConfig) -> None:
        self.engine, self.config = engine, config
        self.batch = config.batch.prompts_per_step * config.batch.samples_per_prompt
        self.slots = task_slots(config)
        self.answers: list[tuple[Prompt, Completion]] = []
        self._requests = self._numbered(prompts)
        self._begun: dict[str, tuple[Any, float]] = {}
        self._took: list[float] = []
        self._tokens = 0

    def _numbered(self, prompts: Any) -> Iterator[tuple[str, Any]]:
        group = 0
        while True:
            for sample in range(self.config.batch.samples_per_prompt):
                yield f"{group}/{sample}", prompts.prompt(group)
            group += 1

    def _submit(self) -> None:
        name, prompt = next(self._requests)
        self._begun[name] = (prompt, time.perf_counter())
        self.engine.submit(name, prompt.token_ids, None)

    def _step(self) -> None:
        for name, completion in self.engine.step():
            prompt, began = self._begun.pop(name)
            self.answers.append((prompt, completion))
            self._took.append(time.perf_counter() - began)
            self._tokens += len(completion.token_ids)

    def first_batch(self) -> dict[str, Any]:
        """The samples of one step from a standing start, as at bound 0 (at most so many seconds).

        All of them end, so that the mean length has no preference for short answers.
        """
        wanted = min(self.batch, 2 * self.slots)
        for _ in range(wanted):
            self._submit()
        self._step()  # the first pass of a model is slower than all others
        began, seconds = time.perf_counter(), 0.0
        while self._begun and seconds < 5 * FIRST_S:
            self._step()
            seconds = time.perf_counter() - began
            if seconds > FIRST_S and len(self.answers) >= wanted / 2:
                break
        if not self.answers:
            raise AccordError(f"the engine finished no answer within {seconds:.0f} s")
        lengths = [len(c.token_ids) for _, c in self.answers]
        return {
            "mean_length": statistics.mean(lengths),
            "length_cv": statistics.pstdev(lengths) / statistics.mean(lengths),
            "mean_prompt": statistics.mean(len(prompt.token_ids) for prompt, _ in self.answers),
            "first_tokens": sum(lengths),
            "first_batch_s": seconds,
        }

    def steady(self) -> dict[str, Any]:
        """Tokens per second with all slots full: between the first answer of a full engine and the
        last one."""
        self._fill()
        self._until(lambda: bool(self._took), FIRST_S)
        self._took.clear()
        before, began, cpu_began = self._tokens, time.perf_counter(), time.process_time()
        enough = began + STEADY_S
        last = [began, before]

        def done() -> bool:
            if self._tokens != last[1]:
                last[:] = [time.perf_counter(), self._tokens]
            return time.perf_counter() > enough and len(self._took) >= self.slots

        self._until(done, 4 * STEADY_S)
        spent = max(last[0] - began, 1e-9)
        return {
            "tokens_per_s": (last[1] - before) / spent,
            "sample_s": statistics.mean(self._took) if self._took else spent,
            "cpu_share": (time.process_time() - cpu_began) / (time.perf_counter() - began),
        }

    def _fill(self) -> None:
        self._took.clear()
        while len(self._begun) < self.slots:
            self._submit()

    def _until(self, done: Any, limit_s: float) -> None:
        deadline = time.perf_counter() + limit_s
        while not done() and time.perf_counter() < deadline:
            self._step()
            while len(self._begun) < self.slots:
                self._submit()

    def stall(self, prepared: Any) -> float:
        """Seconds that a weight update takes from generation: the swap, and the step after it over
        a usual one. The weights are the model's own."""
        from transformers import AutoModelForCausalLM

        from learner.rl.publish import host_arrays

        config = self.config
        policy = AutoModelForCausalLM.from_pretrained(
            config.model.path,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            dtype="float32",
        )
        arrays, _ = host_arrays(policy, config.rollout.dtype)
        usual = [self._timed(self._step) for _ in range(9)]
        self.engine.stage(arrays.items(), 0)
        swap = self._timed(lambda: self.engine.swap(0))
        after = self._timed(self._step)
        return max(0.0, swap + after - statistics.median(usual))

    def _timed(self, work: Any) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began


def _groups(
    answers: list[tuple[Prompt, Completion]], tokenizer: Any, config: TrainConfig
) -> list[RolloutGroup]:
    """As many groups as a step has, unscored: complete ones, again from the first where the probe
    sampled fewer."""
    per = config.batch.samples_per_prompt
    of_prompt: dict[str, list[tuple[Prompt, Completion]]] = {}
    for prompt, completion in answers:
        of_prompt.setdefault(prompt.id, []).append((prompt, completion))
    whole = [found[:per] for found in of_prompt.values() if len(found) >= per]
    if not whole:
        raise AccordError("the probe finished no group of answers")
    nothing = Score(value=0.0, scorer_version="none")

    def sample(prompt: Prompt, completion: Completion, place: int) -> tuple[Rollout, Score]:
        text = str(tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))
        done = _as_version_0(completion)
        rollout = Rollout(prompt=prompt, completion=done, sample_index=place, text=text)
        return rollout, nothing

    return [
        RolloutGroup(
            group_id=number,
            samples=tuple(
                sample(*answer, place) for place, answer in enumerate(whole[number % len(whole)])
            ),
        )
        for number in range(config.batch.prompts_per_step)
    ]


def write_groups(path: Path, groups: list[RolloutGroup]) -> None:
    table = to_table(groups)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_groups(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.OSFile(str(path))).read_all()


def _as_version_0(completion: Completion) -> Completion:
    end = len(completion.token_ids)
    return replace(completion, versions=(VersionSpan(version=0, start=0, end=end),))
