"""What a checkpoint costs: seconds for which training waits, memory of each process.

    python benchmarks/checkpoints.py [--hidden 256 --layers 4 --vocab 8192] [--processes 2]
                                     [--no-moments] [--folder DIR]

A random model, sharded over several processes on this machine (gloo), or whole in one. Prints, of
each process: bytes of its share, seconds of the copy (a step waits for it), seconds of the writing
(which goes on beside steps), the longest time for which the writing kept another Python thread from
running, and how much memory the copy and the writing took at most. Then of the first one: the
same of putting `policy/` together. `--no-moments`: before the first step of the optimiser.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

TICK_S = 0.001
TIMEOUT_S = 600.0


class Watch:
    """While it is open: the longest time between two ticks of another thread, and the growth of
    this process's own memory (not of the files that it maps)."""

    def __init__(self) -> None:
        self.gap_s, self.grown = 0.0, 0
        self._over = threading.Event()

    @contextmanager
    def open(self) -> Iterator[Watch]:
        before = own_bytes()
        watcher = threading.Thread(target=self._ticks, args=(before,))
        watcher.start()
        try:
            yield self
        finally:
            self._over.set()
            watcher.join()

    def _ticks(self, before: int) -> None:
        last = time.perf_counter()
        while not self._over.is_set():
            time.sleep(TICK_S)
            self.grown = max(self.grown, own_bytes() - before)
            now = time.perf_counter()
            self.gap_s, last = max(self.gap_s, now - last), now


def own_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    began, watch = time.perf_counter(), Watch()
    with watch.open():
        found = work()
    seconds = time.perf_counter() - began
    return found, {
        "seconds": round(seconds, 3),
        "longest_gap_s": round(watch.gap_s, 3),
        "grown_mb": round(watch.grown / 1e6, 1),
    }


def make_model(folder: Path, hidden: int, layers: int, vocab: int) -> Path:
    import tokenizers
    import torch
    import transformers

    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>"
    )
    config = transformers.AutoConfig.for_model(
        "qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        intermediate_size=4 * hidden,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def made_state(model: Path, ranks: Any, moments: bool) -> Any:
    import torch

    from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
    from cluster.contracts.config.base import ModelConfig
    from cluster.contracts.config.learner import LearnerConfig, WeightsConfig
    from learner.rl.checkpoint import TrainerState
    from learner.rl.networks import build_kl_controller, build_networks, build_optimizers
    from learner.settings import LearnerSettings

    sharding = {"processes": ranks.size, "sharding": "fsdp2" if ranks.size > 1 else "none"}
    settings = LearnerSettings(
        model=ModelConfig(path=str(model)),
        learner=LearnerConfig.model_validate(sharding),
        algorithm=AlgorithmConfig.model_validate({"advantage": "grpo", "kl": {"coef": 0.0}}),
        staleness=StalenessConfig(),
        batch=BatchConfig(prompts_per_step=4, samples_per_prompt=2, steps=50),
        weights=WeightsConfig(),
        rollout_dtype="float32",
        temperature=1.0,
        max_tokens=8,
        seed=0,
        canary_prompt=(4, 5, 6),
    )
    networks, tokenizer = build_networks(settings, ranks)
    optimizers = build_optimizers(networks, settings.learner)
    if moments:
        for parameter in networks.policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizers.policy.step()
        optimizers.policy.zero_grad()
    return TrainerState(
        networks=networks,
        tokenizer=tokenizer,
        optimizers=optimizers,
        kl=build_kl_controller(settings),
        version=0,
        canary_ids=(4, 5, 6),
    )


def one_checkpoint(state: Any, ranks: Any, root: Path) -> dict[str, Any]:
    from learner.model_files import complete
    from learner.rl.checkpoint import snapshot

    taken, copy = timed(partial(snapshot, state))
    found: dict[str, Any] = {"mb": round(taken.nbytes / 1e6, 1), "copy": copy}
    files, found["write"] = timed(partial(taken.write, root))
    ranks.barrier()
    everything = [file for theirs in ranks.gather(files) for file in theirs]
    if ranks.first:
        _, found["complete"] = timed(partial(complete, root, everything))
    return found


def one_process(args: argparse.Namespace, folder: Path, rank: int, port: int) -> None:
    import torch

    from learner.compute.ranks import SINGLE, join

    torch.set_num_threads(1)
    ranks = SINGLE
    if args.processes > 1:
        place = ("127.0.0.1", port)
        ranks = join(rank, args.processes, place, gpu=False, timeout_s=TIMEOUT_S)
    state = made_state(folder / "model", ranks, not args.no_moments)
    root = folder / "checkpoint"
    for _ in range(args.repeats):
        if rank == 0:
            shutil.rmtree(root, ignore_errors=True)
        ranks.barrier()
        told = one_checkpoint(state, ranks, root)
    print(json.dumps({"rank": rank, "last_of": args.repeats, **told}), flush=True)
    ranks.barrier()
    ranks.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-moments", action="store_true")
    parser.add_argument("--folder")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        one_process(args, Path(args.folder), args.rank, args.port)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        make_model(Path(name), args.hidden, args.layers, args.vocab)
        from learner.compute.ranks import meeting_place

        store = meeting_place("127.0.0.1", TIMEOUT_S)
        words = [*sys.argv, "--folder", name, "--port", str(store.port)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen([sys.executable, *words, "--rank", str(rank)], env=env)
            for rank in range(args.processes)
        ]
        codes = [process.wait() for process in started]
    if any(codes):
        sys.exit(f"processes ended with {codes}")


if __name__ == "__main__":
    main()
