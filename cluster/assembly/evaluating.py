"""The policy evaluated while it trains: its held-out prompts, and the judge in the driver."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.assembly.prepare import Prepared
from cluster.contracts.config.reward import RewardConfig, is_learnt_from
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.durable import write_text
from cluster.contracts.errors import AccordError
from cluster.contracts.protocols import Scorer
from cluster.contracts.records import Rollout, Score
from cluster.loop.evaluations import EvaluationRole, Verdict
from cluster.runs.evaluations import EvaluationFiles, samples_file
from cluster.runs.rows import whole_rows

T = TypeVar("T")
Scores = Callable[[Sequence[Rollout]], list[Score]]
Key = tuple[str, int]  # id of a prompt, place of the completion among its samples


def evaluation_role(
    prepared: Prepared, run_dir: Path, reward_client: Callable[[str], Scorer]
) -> EvaluationRole | None:
    """``reward_client``: makes a client of the run's own reward service. None: not to be
    evaluated."""
    config = prepared.config.evaluation
    if not config.every:
        return None
    fingerprint = prepared.tokenizer_fingerprint
    if config.judge is not None:
        names = ", ".join(source.name for source in config.judge.sources)
        scores: Scores = OwnScorer(config.judge, fingerprint)
    else:
        names, scores = "reward", _Client(reward_client, fingerprint)
    return EvaluationRole(
        config=config,
        prompts=prepared.held_out,
        judge=DriverJudge(
            names, judge_was_reward(prepared.config), scores, run_dir, prepared.config.run.seed
        ),
        files=EvaluationFiles(run_dir),
        seed=prepared.config.run.seed,
    )


def judge_was_reward(config: TrainConfig) -> bool:
    """Whether the judge, or one of its sources, is what the policy is trained on: its scores then
    say how far that was optimised, not how good the policy is."""
    judge = config.evaluation.judge
    if judge is None:
        return True
    if config.reward.address is not None:
        return False  # what scores there is not known here
    reward = config.reward
    own = [
        _content(reward, at)
        for at, source in enumerate(reward.sources)
        if is_learnt_from(source.model_dump(), reward.combine)
    ]
    return any(_content(judge, at) in own for at in range(len(judge.sources)))


def _content(rewards: RewardConfig, at: int) -> Mapping[str, Any]:
    return rewards.sources[at].model_dump(exclude={"name", "weight", "at_least"})


@dataclass(slots=True)
class OwnScorer:
    """The judge's sources in this process, loaded when they are first used."""

    config: RewardConfig
    tokenizer: str  # fingerprint
    _scorer: Any = None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        from reward_service import wire
        from reward_service.composition import build

        if self._scorer is None:
            self._scorer = build(self.config)
        items, most = wire.items_of(rollouts, self.tokenizer), self.config.max_batch
        parts = (items[at : at + most] for at in range(0, len(items), most))
        return [score for part in parts for score in self._scorer.score(part)]


@dataclass(slots=True)
class _Client:
    """The run's own reward service, asked over gRPC as the workers ask it."""

    make: Callable[[str], Scorer]
    tokenizer: str
    _client: Scorer | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        if self._client is None:
            self._client = self.make(self.tokenizer)
        return self._client.score(rollouts)


class DriverJudge:
    """Scores completions on a thread of its own, and compares them with those of the start."""

    def __init__(
        self, name: str, was_reward: bool, scores: Scores, run_dir: Path, seed: int
    ) -> None:
        self.name = name
        self.was_reward = was_reward
        self._scores = scores
        self._run_dir = run_dir
        self._seed = seed
        self._busy_with: int | None = None

    async def judge(self, step: int, rollouts: Sequence[Rollout]) -> Verdict:
        """Raises AccordError for whatever keeps the judge from its scores."""
        if self._busy_with is not None:
            raise AccordError(f"the judge is still busy with step {self._busy_with}")
        return await on_daemon_thread(lambda: self._judge(step, rollouts))

    def _judge(self, step: int, rollouts: Sequence[Rollout]) -> Verdict:
        self._busy_with = step
        try:
            scores = [score.value for score in self._scores(rollouts)]
        except AccordError:
            raise
        except Exception as problem:  # of a user's own judge; training goes on without it
            raise AccordError(f"the judge failed: {type(problem).__name__}: {problem}") from problem
        finally:
            self._busy_with = None
        self._write(step, rollouts, scores)
        return self._compared(step, rollouts, scores)

    def _compared(self, step: int, rollouts: Sequence[Rollout], scores: Sequence[float]) -> Verdict:
        from learner.evaluation.win_rate import win_rate

        mean, start = statistics.fmean(scores), self._start() if step > 0 else {}
        pairs, prompts = [], []
        for rollout, score in zip(rollouts, scores, strict=True):
            if (before := start.get(_key(rollout))) is not None:
                pairs.append((score, before))
                prompts.append(rollout.prompt.id)
        if not pairs:
            return Verdict(score=mean)
        rate = win_rate(pairs, prompts, seed=self._seed)
        return Verdict(score=mean, win_rate=rate.rate, ci_low=rate.ci_low, ci_high=rate.ci_high)

    def _start(self) -> dict[Key, float]:
        """Scores of the completions of the start; none where it was not evaluated."""
        try:
            text = samples_file(self._run_dir, 0).read_text(encoding="utf-8")
            rows = whole_rows(text)
            return {(row["prompt_id"], row["sample"]): float(row["score"]) for row in rows}
        except FileNotFoundError:
            return {}
        except (OSError, LookupError, TypeError, ValueError) as problem:
            raise AccordError(f"the scores of the start cannot be read: {problem!r}") from problem

    def _write(self, step: int, rollouts: Sequence[Rollout], scores: Sequence[float]) -> None:
        path = samples_file(self._run_dir, step)
        rows = (_row(rollout, score) for rollout, score in zip(rollouts, scores, strict=True))
        try:
            path.parent.mkdir(exist_ok=True)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(path, text)
        except OSError as problem:
            raise AccordError(f"{path} cannot be written: {problem}") from problem


def _key(rollout: Rollout) -> Key:
    return rollout.prompt.id, rollout.sample_index


def _row(rollout: Rollout, score: float) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample_index,
        "prompt": [dict(message) for message in rollout.prompt.messages],
        "completion": rollout.text,
        "score": score,
        "tokens": len(rollout.completion.token_ids),
        "finish_reason": rollout.completion.finish_reason,
        "versions": [span.version for span in rollout.completion.versions],
    }


async def on_daemon_thread(work: Callable[[], T]) -> T:
    """What ``work`` answers or raises. A thread that hangs for ever does not keep the process from
    ending, as one of asyncio's own would."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, problem: BaseException | None) -> None:
        if answer.done():
            return  # nobody waits any more
        if problem is not None:
            answer.set_exception(problem)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, problem = None, None
        try:
            result = work()
        except BaseException as raised:
            problem = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, result, problem)

    threading.Thread(target=run, name="judge", daemon=True).start()
    return await answer
