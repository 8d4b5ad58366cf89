"""What the benchmarks on the help-desk task start from: one fine-tuned policy, one reward model.

The help-desk task of `accord quickstart` with a smaller model, made by the same functions; the
answers come from the engine on transformers, so that nothing but this process is needed.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_PROMPT_TOKENS = 48
MAX_ANSWER_TOKENS = 48
ANSWERS_PER_PROMPT = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSize:
    """Size of model and data. About 0.4 million parameters and two minutes on one core."""

    seed: int = 0
    hidden: int = 96
    layers: int = 3
    heads: int = 4
    intermediate: int = 288
    demonstrations: int = 16000
    preference_prompts: int = 1600
    rl_prompts: int = 1600
    eval_prompts: int = 200
    sft_steps: int | None = None
    reward_epochs: int = 2


class Sampler:
    """Answers of one batch at a time by `TransformersEngine`, from weights of any version."""

    def __init__(self, model: Path, running: int, dtype: str = "float32") -> None:
        from actors.engines.transformers_engine import TransformersEngine
        from actors.settings import EngineSettings
        from learner.models.load import load_tokenizer, stop_token_ids

        self.tokenizer = load_tokenizer(model)
        settings = EngineSettings(
            model_path=str(model),
            dtype=dtype,
            max_tokens=MAX_ANSWER_TOKENS,
            stop_token_ids=stop_token_ids(model, self.tokenizer),
            max_running=running,
            max_model_len=MAX_PROMPT_TOKENS + MAX_ANSWER_TOKENS,
        )
        self.engine = TransformersEngine(settings)
        self.engine.version = 0
        self._running = running

    def answers(self, prompts: Sequence[Any], samples: int, *seed: int | str) -> list[Any]:
        """`samples` completions of each prompt, in order; each row has a seed of its own, made of
        `seed`, so that what is drawn does not depend on what else is in the batch."""
        from actors.settings import derive_seed

        rows = [(prompt, s) for prompt in prompts for s in range(samples)]
        found: dict[str, Any] = {}
        for first in range(0, len(rows), self._running):
            for number, (prompt, s) in enumerate(rows[first : first + self._running], start=first):
                own = derive_seed("staleness", *seed, prompt.id, s)
                self.engine.submit(str(number), prompt.token_ids, own)
            while self.engine.unfinished:
                found.update(self.engine.step())
        return [found[str(number)] for number in range(len(rows))]

    def text(self, completion: Any) -> str:
        return str(self.tokenizer.decode(completion.token_ids, skip_special_tokens=True))


def prompts_of(base: Path, split: str, seed: int = 0, shuffle: bool = False) -> Any:
    """The prompts of a split: `.prompt(n)` is the n-th, `len` how many there are."""
    from actors.prompts import load_prompts
    from cluster.contracts.config.rollout import DataConfig
    from learner.models.load import load_tokenizer

    file = str(base / f"{split}_prompts.jsonl")
    data = DataConfig(prompts=file, max_prompt_tokens=MAX_PROMPT_TOKENS, shuffle=shuffle)
    return load_prompts(data, load_tokenizer(base / "policy"), seed)


def ensure_base(folder: Path, size: BaseSize) -> Path:
    """Make the base under `folder`, or return the one of this size that is there already."""
    done = folder / "base.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["size"] == asdict(size):
        return folder
    began = time.process_time()
    shutil.rmtree(folder, ignore_errors=True)
    _make_model(folder, size)
    sft = _fine_tune(folder, size)
    reward = _learn_reward(folder, size)
    figures = {"size": asdict(size), "cpu_s": time.process_time() - began, **sft, **reward}
    done.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return folder


def _make_model(folder: Path, size: BaseSize) -> None:
    from cluster.quickstart.helpdesk import demonstrations, files, questions
    from learner.models.tiny import fresh_model, train_tokenizer

    rows = demonstrations.sample_demonstrations(size.seed, size.demonstrations)
    files.write_sft(folder / "demonstrations.jsonl", rows)
    wanted: dict[questions.Split, int] = {
        "preference": size.preference_prompts,
        "rl": size.rl_prompts,
        "eval": size.eval_prompts,
    }
    for split, count in wanted.items():
        chosen = questions.sample_questions(size.seed, count, split)
        files.write_prompts(folder / f"{split}_prompts.jsonl", chosen)
    fresh = folder / "fresh"
    tokenizer = train_tokenizer(demonstrations.corpus(size.seed, 4000), 640, fresh)
    fresh_model(
        tokenizer, fresh, hidden=size.hidden, layers=size.layers, heads=size.heads,
        intermediate=size.intermediate, arch="qwen2", seed=size.seed,
    )  # fmt: skip


def _fine_tune(folder: Path, size: BaseSize) -> dict[str, float]:
    from cluster.contracts.config.base import ModelConfig, RunConfig
    from cluster.contracts.config.offline import FitConfig, SftConfig, SftDataConfig
    from learner.offline.sft import train_sft

    fit = FitConfig(
        lr=4e-3, rows_per_step=32, tokens_per_microbatch=2048, schedule="linear", warmup_ratio=0.03,
        max_tokens=128, eval_fraction=0.02, eval_every=10_000, threads=1, max_steps=size.sft_steps,
    )  # fmt: skip
    config = SftConfig(
        run=RunConfig(seed=size.seed),
        model=ModelConfig(path=str(folder / "fresh")),
        data=SftDataConfig(path=str(folder / "demonstrations.jsonl")),
        fit=fit,
    )
    train_sft(config, folder / "sft")
    shutil.move(folder / "sft" / "policy", folder / "policy")
    return _last(folder / "sft")


def _learn_reward(folder: Path, size: BaseSize) -> dict[str, float]:
    """Simulated annotators compare answers of the fine-tuned policy; Bradley-Terry on the pairs."""
    from cluster.contracts.config.base import ModelConfig, RunConfig
    from cluster.contracts.config.offline import FitConfig, PairsConfig, RewardModelConfig
    from cluster.quickstart.helpdesk.files import write_jsonl
    from learner.offline.reward import train_reward_model

    sampler = Sampler(folder / "policy", running=192)
    source = prompts_of(folder, "preference")
    prompts = [source.prompt(n) for n in range(len(source))]
    done = sampler.answers(prompts, ANSWERS_PER_PROMPT, "preference", size.seed)
    texts = [sampler.text(completion) for completion in done]
    groups = [texts[i : i + ANSWERS_PER_PROMPT] for i in range(0, len(texts), ANSWERS_PER_PROMPT)]
    write_jsonl(folder / "pairs.jsonl", _compared(prompts, groups, size.seed))
    answers = (
        {"prompt": [dict(m) for m in prompt.messages], "completion": _said(text)}
        for prompt, group in zip(prompts, groups, strict=True)
        for text in group[:2]
    )
    write_jsonl(folder / "answers.jsonl", answers)
    fit = FitConfig(
        lr=7e-4, epochs=size.reward_epochs, rows_per_step=32, tokens_per_microbatch=2048,
        schedule="linear", max_tokens=128, eval_fraction=0.15, eval_every=10_000,
        weight_decay=0.01, threads=1,
    )  # fmt: skip
    config = RewardModelConfig(
        run=RunConfig(seed=size.seed),
        model=ModelConfig(path=str(folder / "policy")),
        data=PairsConfig(path=str(folder / "pairs.jsonl")),
        policy_samples=str(folder / "answers.jsonl"),
        fit=fit,
    )
    train_reward_model(config, folder / "reward")
    shutil.move(folder / "reward" / "reward_model", folder / "reward_model")
    return _last(folder / "reward")


def _compared(
    prompts: Sequence[Any], groups: Sequence[Sequence[str]], seed: int
) -> Iterator[dict[str, Any]]:
    """Of each prompt's answers two pairs, and two answers against answers to other prompts (as the
    quickstart does, and for the same reason: a reward model has to read the question)."""
    from cluster.quickstart.helpdesk.annotators import ANNOTATORS, label_pair

    rng = random.Random(f"pairs/{seed}")
    for prompt, own in zip(prompts, groups, strict=True):
        others = [rng.choice(groups)[4], rng.choice(groups)[5]]
        for a, b in ((own[0], own[1]), (own[2], own[3]), (own[4], others[0]), (own[5], others[1])):
            label = label_pair(rng.choice(ANNOTATORS), prompt.metadata, a, b, rng)
            if a == b or label.choice not in ("a", "b"):
                continue
            chosen, rejected = (a, b) if label.choice == "a" else (b, a)
            yield {
                "prompt": [dict(m) for m in prompt.messages],
                "chosen": _said(chosen),
                "rejected": _said(rejected),
            }


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _last(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "fit.json").read_text("utf-8"))["evaluation"]
    return found
