"""PPO and GRPO on one page, in one process, one thing after another: what `accord train` equals.

For tests/integration/test_reference_loop.py: reference_loop.py JOBS.json OUT.json. Of Accord it
imports one kernel, the log-probability of a token under a linear head (tests/numerics holds that to
float64): its hand-written backward rounds otherwise than autograd. vLLM loads weights by its own
`reload_weights`, for untied heads only. Equality is meant bit for bit, so sums run over the shapes
the learner sums over: rows by falling length, answers in a grid, the head at answer positions only.
"""

from __future__ import annotations

import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import copy
import hashlib
import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from learner.algorithms.logprobs import chunked_linear_logprobs

TEMPERATURE, EPS, CLIP_VALUE, VALUE_COEF, GAMMA, LAM, CAP = 0.8, 0.2, 0.2, 0.1, 1.0, 0.95, 5.0
SAMPLING = {"temperature": TEMPERATURE, "ignore_eos": True, "logprobs": 0, "detokenize": False}


class Loop:
    """One run. `steps` holds what each step sampled, scored and made of it."""

    def __init__(self, job: dict[str, Any], engine: LLMEngine) -> None:
        self.job, self.engine, self.gae = job, engine, job["advantage"] == "gae"
        self.policy = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
        self.rows = [json.loads(x)["prompt"] for x in Path(job["prompts"]).read_text().splitlines()]
        self.reward, self.steps = runpy.run_path(job["reward"])["reward"], []
        self.trained = list(self.policy.parameters())
        groups: list[Any] = [
            {"params": [p for p in self.trained if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in self.trained if p.ndim < 2], "weight_decay": 0},
        ]
        if self.gae:
            self.head = torch.nn.Linear(self.policy.config.hidden_size, 1)
            self.trained += (ends := [torch.nn.init.zeros_(p) for p in self.head.parameters()])
            groups.append({"params": ends, "weight_decay": 0})
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def run(self) -> list[dict[str, Any]]:
        for step in range(self.job["steps"]):
            weights = {"weights_iterator": self.policy.state_dict().items()}
            self.engine.collective_rpc("reload_weights", kwargs=weights)
            sampled = self.generate(step)
            torch.set_float32_matmul_precision(self.job["precision"])
            self.train(step, *sampled)
            torch.set_float32_matmul_precision("highest")
        self.policy.save_pretrained(self.job["out"])
        return self.steps

    def generate(self, step: int) -> tuple[list[Any], ...]:
        """(messages, prompt ids, answer ids, their log-probabilities) of each sample."""
        turns, prompts, done, size = [], [], {}, self.job["prompts_per_step"]
        for group in range(step * size, (step + 1) * size):
            epoch, place = divmod(group, len(self.rows))
            order = list(range(len(self.rows)))
            random.Random(f"prompts/{self.job['seed']}/{epoch}").shuffle(order)
            messages = self.rows[order[place]]
            content = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
            prompt_id = f"{order[place] + 1:07d}-{content[:16]}"
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)[
                "input_ids"
            ]
            for sample in range(self.job["samples"]):
                name = f"{self.job['seed']}/sample/{group}/{prompt_id}/{sample}"
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1
                own = {"seed": seed, "stop_token_ids": [self.tokenizer.eos_token_id]}
                params = SamplingParams(**own, max_tokens=12, **SAMPLING)
                self.engine.add_request(str(len(turns)), {"prompt_token_ids": ids}, params)
                turns.append(messages)
                prompts.append(ids)
        while self.engine.has_unfinished_requests():
            done |= {int(o.request_id): o.outputs[0] for o in self.engine.step() if o.finished}
        answers = [list(done[row].token_ids) for row in range(len(turns))]
        tops = [zip(done[row].logprobs, ids, strict=True) for row, ids in enumerate(answers)]
        return turns, prompts, answers, [[at[i].logprob for at, i in line] for line in tops]

    def train(self, step: int, turns: Any, prompts: Any, answers: Any, logps: Any) -> None:
        job, rows, width = self.job, len(answers), max(map(len, answers))
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = self.reward(turns, [[{"role": "assistant", "content": t}] for t in texts])
        mask = torch.arange(width) < torch.tensor([[len(ids)] for ids in answers])
        mu = torch.tensor([(line + [0.0] * width)[:width] for line in logps])
        with torch.no_grad():
            old, old_values = self.forward(self.policy, prompts, answers, range(rows), width)
            ref, _ = self.forward(self.reference, prompts, answers, range(rows), width)
        penalty = -job["kl_coef"] * (old - ref) if self.gae else torch.zeros_like(old)
        rewards = penalty.where(mask, 0.0)
        for row, score in enumerate(scores):
            rewards[row, len(answers[row]) - 1] += torch.tensor(score)
        advantages, returns = self.advantages(rewards, mask, old_values)
        weight = (old - mu).where(mask, 0.0).exp().clamp(0.0, CAP)
        lists = dict(logps=mu.tolist(), rewards=rewards.tolist(), advantages=advantages.tolist())
        self.steps.append({"tokens": answers, "scores": scores, **lists})
        for group in self.adam.param_groups:  # three steps up, then linearly down
            falling = 1.0 - (step - 3) / (job["steps"] - 3)
            group["lr"] = job["lr"] * (min(1.0, (step + 1) / 3) if step < 3 else falling)
        for epoch in range(2):
            order = np.random.default_rng([job["seed"], step, epoch]).permutation(rows)
            for part in np.array_split(order, 2):
                chosen = sorted(sorted(part), key=lambda r: -len(prompts[r]) - len(answers[r]))
                cut = max(len(answers[r]) for r in chosen)
                all_rows = (mask, old, advantages, weight, mu, ref, returns, old_values)
                here = [None if x is None else x[chosen, :cut] for x in all_rows]
                logp, values = self.forward(self.policy, prompts, answers, chosen, cut)
                self.update(self.loss(logp, values, here))

    def loss(self, logp: Any, v: Any, fixed: list[Any]) -> Any:
        mask, old, adv, w, mu, ref, returns, old_v = fixed
        ratio, tokens = (logp.where(mask, 0.0) - old).exp(), int(mask.sum())
        gain = torch.minimum(ratio * adv, ratio.clamp(1 - EPS, 1 + EPS) * adv)
        policy = ((-gain).where(mask, 0.0) * w).where(mask, 0.0).sum() / tokens
        if self.gae:
            near = old_v + (v - old_v).clamp(-CLIP_VALUE, CLIP_VALUE)
            squares = torch.maximum((v - returns).square(), (near - returns).square())
            return policy + VALUE_COEF * ((0.5 * squares).where(mask, 0.0).sum() / tokens)
        kl = (logp.detach() - mu).exp().clamp(max=CAP) * (0.5 * (logp - ref).square())
        return policy + self.job["kl_coef"] * (kl.where(mask, 0.0).sum() / tokens)

    def forward(self, model: Any, prompts: Any, answers: Any, rows: Any, width: int) -> Any:
        """(log-probabilities, values of the states before each token or None), [rows, width]."""
        by_length = sorted(rows, key=lambda r: -len(prompts[r]) - len(answers[r]))
        whole = [prompts[r] + answers[r] for r in by_length]
        longest = len(whole[0])
        real = torch.arange(longest) < torch.tensor([[len(ids)] for ids in whole])
        ids = torch.tensor([(line + [0] * longest)[:longest] for line in whole])
        places = (real.long().cumsum(1) - 1).clamp(min=0)
        hidden = model.model(ids, real.long(), places, use_cache=False).last_hidden_state
        source, target = [], []  # flat places: before each answer token, and of it among answers
        for line, r in enumerate(by_length):
            source += [line * longest + len(prompts[r]) - 1 + at for at in range(len(answers[r]))]
            target += [list(rows).index(r) * width + at for at in range(len(answers[r]))]
        labels = torch.tensor([token for r in by_length for token in answers[r]])
        source, target = torch.tensor(source), torch.tensor(target)
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, source)
        head = {"weight": model.lm_head.weight, "labels": labels, "temperature": TEMPERATURE}
        flat, _ = chunked_linear_logprobs(chosen, **head, entropy=False, keep=True)
        grid = torch.zeros(len(rows) * width)
        logp = grid.index_copy(0, target, flat).view(len(rows), width)
        if not self.gae:
            return logp, None
        values = self.head(hidden)[..., 0].reshape(-1).index_select(0, source)
        return logp, grid.index_copy(0, target, values).view(len(rows), width)

    def advantages(self, rewards: Any, mask: Any, values: Any) -> tuple[Any, Any]:
        if not self.gae:
            totals = rewards.sum(1).double().view(-1, self.job["samples"])
            centred = totals - totals.mean(1, keepdim=True)
            spread = (centred.square().sum(1, keepdim=True) / (totals.shape[1] - 1)).sqrt()
            each = (centred / (spread + 1e-6)).float().view(-1, 1)
            return each.expand_as(mask).where(mask, 0.0), None
        raw = torch.zeros_like(rewards)
        for row, count in enumerate(mask.sum(1).tolist()):
            after = later = torch.tensor(0.0)
            for t in reversed(range(count)):
                delta = rewards[row, t] + GAMMA * after - values[row, t]
                after, raw[row, t] = values[row, t], (later := delta + GAMMA * LAM * later)
        count, exact = int(mask.sum()), raw.double()
        var = (exact.square().sum() - exact.sum() * (exact.sum() / count)) / (count - 1)
        white = (raw - (exact.sum() / count).float()) * torch.rsqrt(var.float() + 1e-8)
        return white.where(mask, 0.0), (raw + values).where(mask, 0.0)

    def update(self, loss: Any) -> None:
        self.adam.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.trained]))
        for parameter in self.trained if norm > 1.0 else ():
            parameter.grad.mul_(1.0 / (norm + 1e-6))
        self.adam.step()


jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
common: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True}
common |= {"kv_cache_memory_bytes": 64 << 20, "block_size": 32, "async_scheduling": False}
common |= {"skip_tokenizer_init": True, "logprobs_mode": "processed_logprobs"}
llm = LLMEngine.from_engine_args(EngineArgs(model=jobs[0]["model"], **common))
Path(sys.argv[2]).write_text(json.dumps([Loop(job, llm).run() for job in jobs]), encoding="utf-8")
