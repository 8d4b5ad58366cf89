"""Loads a run's adapter beside its base with peft, transformers and plain vLLM; prints how far each
one's log-probabilities are from those of the run's merged policy."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}

import torch
from transformers import AutoModelForCausalLM

IDS = [5, 9, 6, 7, 8, 5, 9, 6, 7, 8, 9, 5]


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    ids = torch.tensor([IDS])
    every = model.eval()(ids).logits[0, :-1].float().log_softmax(dim=-1)
    return every.gather(1, ids[0, 1:, None])[:, 0]


def of_vllm(base: str, adapter: str, rank: int) -> torch.Tensor:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine: Any = LLM(
        model=base, dtype="float32", enable_lora=True, max_lora_rank=rank, max_loras=2,
        enforce_eager=True, max_model_len=32, max_num_seqs=2, block_size=32,
        kv_cache_memory_bytes=32 << 20, skip_tokenizer_init=True,
    )  # fmt: skip
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    [answer] = engine.generate(
        {"prompt_token_ids": IDS}, wanted, use_tqdm=False,
        lora_request=LoRARequest("accord", 1, adapter),
    )  # fmt: skip
    rows = zip(IDS[1:], answer.prompt_logprobs[1:], strict=True)
    return torch.tensor([row[token].logprob for token, row in rows])


def main(run: Path) -> None:
    from peft import PeftModel

    adapter = str(run / "adapter")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"]

    def loaded(path: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    merged, native = logprobs(loaded(run / "policy")), loaded(base)
    native.load_adapter(adapter)
    found = {
        "peft": logprobs(PeftModel.from_pretrained(loaded(base), adapter)),
        "transformers": logprobs(native),
        "vllm": of_vllm(base, adapter, config["r"]),
        "moved": logprobs(loaded(base)),
    }
    far = {name: float((x - merged).abs().max()) for name, x in found.items()}
    sys.stdout.write(json.dumps(far) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
