"""TRL's side of the comparison; runs in TRL's own environment (see run.py).

    python trl_grpo.py SETTINGS.json RESULT.json

Generation is transformers' `generate`, TRL's default; vLLM inside TRL needs a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
os.environ["OMP_NUM_THREADS"] = str(SETTINGS["threads"])  # read once, when torch is imported

import reward  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class Watch(TrainerCallback):
    """When each step ended and what its batch scored; stops at the wanted reward."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.rewards: list[float] = []
        self.lengths: list[float] = []
        self.cpu: list[float] = []
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.began = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.ends.append(time.time())
        self.cpu.append(time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if "reward" not in logs:
            return
        self.rewards.append(float(logs["reward"]))
        self.lengths.append(float(logs["completions/mean_length"]))
        last = self.rewards[-SETTINGS["smooth"] :]
        reached = len(last) == SETTINGS["smooth"] and sum(last) / len(last) >= SETTINGS["target"]
        if reached and len(self.ends) >= SETTINGS["least_steps"]:
            control.should_training_stop = True


def main() -> None:
    torch.set_num_threads(SETTINGS["threads"])
    rows = Path(SETTINGS["prompts"]).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in rows]
    watch = Watch()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(SETTINGS["model"]),
        reward_funcs=getattr(reward, SETTINGS["reward"]),
        args=config(),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[watch],
    )
    trainer.train()
    result = {
        "began": watch.began,
        "ends": watch.ends,
        "cpu": watch.cpu,
        "rewards": watch.rewards,
        "lengths": watch.lengths,
        "versions": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def config() -> GRPOConfig:
    samples = SETTINGS["samples_per_prompt"]
    parts = SETTINGS["microbatches"]
    return GRPOConfig(
        output_dir=SETTINGS["folder"],
        use_cpu=True,
        bf16=SETTINGS["bf16"],
        seed=SETTINGS["seed"],
        max_steps=SETTINGS["most_steps"],
        per_device_train_batch_size=SETTINGS["prompts_per_step"] * samples // parts,
        gradient_accumulation_steps=parts,
        num_generations=samples,
        max_completion_length=SETTINGS["max_tokens"],
        generation_kwargs={"min_new_tokens": SETTINGS["min_tokens"]},
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=SETTINGS["lr"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        gradient_checkpointing=SETTINGS["gradient_checkpointing"],
        dataloader_num_workers=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


main()
