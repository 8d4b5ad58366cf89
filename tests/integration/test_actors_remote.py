"""The Ray shell of a rollout worker, with the small engine.

Errors keep their type, payloads outlive their worker, a lost worker is Retryable, the next
incarnation samples differently.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from cluster.contracts.errors import (
    Resumable,
    Retryable,
    RewardFailure,
    UserError,
    WeightMismatch,
    WorkerDied,
)
from cluster.contracts.records import Assignment, Canary, Harvest, Prompt, Rollout, Score
from cluster.contracts.rollout_table import from_table

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
T = TypeVar("T")


class CountTokens:
    """Fails for a prompt that asks for it."""

    version = "count-1"

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        if any(r.prompt.metadata.get("fail") for r in rollouts):
            raise RewardFailure("asked to fail")
        lengths = [len(r.completion.token_ids) for r in rollouts]
        return [Score(value=float(n), scorer_version=self.version) for n in lengths]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of words beside it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<s>", "</s>", *(f"w{n}" for n in range(38))]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(repo_root: Path) -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(repo_root)  # inherited by Ray's workers
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def make(model: Path, scorer: Any = CountTokens, **keys: Any) -> Any:
    from actors.remote import make_worker_factory
    from actors.serving import WorkerSpec
    from actors.settings import EngineSettings

    settings = EngineSettings(
        model_path=str(model), max_tokens=8, stop_token_ids=(1,), max_model_len=32, max_running=8
    )
    spec = WorkerSpec(engine=settings, kind="transformers", make_scorer=scorer, seed=4, **keys)
    return make_worker_factory(spec, num_cpus=1)


def wait(work: Awaitable[T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(limited())


def weights(model: Path) -> tuple[dict[str, np.ndarray], dict[str, str], Canary]:
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
        ids = torch.tensor([[3, 4, 5, 6]])
        logprobs = torch.log_softmax(policy(ids).logits[0, :-1], -1)
    exact = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    canary = Canary(token_ids=(3, 4, 5, 6), logprobs=tuple(exact), tolerance=1e-3)
    arrays = {name: p.detach().numpy() for name, p in policy.named_parameters()}
    return arrays, dict.fromkeys(arrays, "float32"), canary


def prompt(n: int, **metadata: Any) -> Prompt:
    message = {"role": "text", "content": f"w{n}"}
    return Prompt(id=f"p{n}", messages=(message,), token_ids=(2 + n, 5), metadata=metadata)


async def collect(worker: Any, groups: int) -> list[Harvest]:
    harvests: list[Harvest] = []
    deadline = time.monotonic() + 30
    while sum(len(h.groups) for h in harvests) < groups:
        assert time.monotonic() < deadline
        harvests.append(await worker.harvest(1.0))
    return harvests


async def keep_harvesting(worker: Any) -> None:
    for _ in range(20):
        await worker.harvest(0.5)


def test_a_worker_from_start_to_loss(cluster: None, model: Path) -> None:
    from cluster.weights.object_store import ObjectStorePublisher
    from cluster.weights.transports import publish

    worker = make(model)(0, 0)
    arrays, dtypes, canary = weights(model)
    publisher = ObjectStorePublisher()

    async def life() -> list[Harvest]:
        info = await worker.start()
        assert info["engine"].startswith("transformers ")
        assert info["pid"] != os.getpid()
        report = await worker.load_weights(publish(publisher, arrays, dtypes, 0, canary))
        assert report.version == 0
        assert report.canary_logp_diff < 1e-4
        with pytest.raises(WeightMismatch, match="version 0 is in force"):
            await worker.load_weights(publish(publisher, arrays, dtypes, 0, canary))
        work = [Assignment(group_id=n, prompt=prompt(n), samples=2) for n in range(4)]
        await worker.submit([*work, Assignment(group_id=9, prompt=prompt(40), samples=2)])
        harvests = await collect(worker, 5)
        os.kill(info["pid"], signal.SIGKILL)
        with pytest.raises(WorkerDied, match="worker-0"):
            await keep_harvesting(worker)
        with pytest.raises(Retryable):
            await worker.stop()
        return harvests

    harvests = wait(life())
    metas = {m.group_id: m for h in harvests for m in h.groups}
    assert metas[9].failure is not None
    assert not metas[9].retryable
    # Read only now, when the process that made them is dead.
    tables = [ray.get(h.payload[0], timeout=10) for h in harvests if h.payload]
    groups = {g.group_id: g for table in tables for g in from_table(table)}
    assert sorted(groups) == [0, 1, 2, 3]
    for rollout, score in groups[2].samples:
        assert score.value == len(rollout.completion.token_ids)
        assert rollout.text.startswith("w")
        assert {s.version for s in rollout.completion.versions} == {0}


def test_failures_keep_their_kind(cluster: None, model: Path, tmp_path: Path) -> None:
    from cluster.weights.object_store import ObjectStorePublisher
    from cluster.weights.transports import publish

    async def life() -> None:
        lost = make(tmp_path)(0, 0)
        with pytest.raises(UserError, match="tokenizer"):
            await lost.start()
        await lost.stop()
        worker = make(model, reward_outage_s=0.0)(1, 0)
        await worker.start()
        arrays, dtypes, canary = weights(model)
        await worker.load_weights(publish(ObjectStorePublisher(), arrays, dtypes, 0, canary))
        await worker.submit([Assignment(group_id=0, prompt=prompt(1, fail=True), samples=1)])
        with pytest.raises(Resumable, match=r"could not be had for 0 s .*: asked to fail"):
            await collect(worker, 1)
        await worker.stop()

    wait(life())


def test_offline_samples_in_order_and_new_incarnations_differ(cluster: None, model: Path) -> None:
    from actors.sampling import generate_all

    factory = make(model, scorer=None, transport=None)
    prompts = [prompt(n % 30) for n in range(50)]

    async def life() -> tuple[list[Rollout], list[Rollout]]:
        workers = [factory(0, 0), factory(1, 0)]
        await asyncio.gather(*(w.start() for w in workers))
        first = await generate_all(workers, prompts, 2, timeout_s=40, chunk=8)
        await asyncio.gather(*(w.stop() for w in workers))
        again = factory(0, 1)
        await again.start()
        second = await generate_all([again], prompts, 2, timeout_s=40, chunk=64)
        with pytest.raises(Retryable, match="had no answer"):
            await generate_all([again], prompts, 2, timeout_s=0)
        await again.stop()
        return first, second

    first, second = wait(life())
    assert [(r.prompt.id, r.sample_index) for r in first] == [
        (p.id, sample) for p in prompts for sample in range(2)
    ]
    assert [r.completion.token_ids for r in first] != [r.completion.token_ids for r in second]


def test_a_worker_on_a_host_with_other_software_does_not_start(cluster: None, model: Path) -> None:
    from cluster.machine.handshake import software
    from cluster.machine.shipment import Shipment

    driver = asdict(software())
    driver["versions"] = {**driver["versions"], "torch": "1.0.0"}
    worker = make(model, files=Shipment(software=driver))(0, 0)
    try:
        with pytest.raises(UserError, match=r"torch \S+ instead of 1\.0\.0"):
            wait(worker.start())
    finally:
        wait(worker.stop())
