"""The transformers engine against plain forward passes: exact log-probabilities, exact versions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from actors.engines import host_tensors
from actors.engines.transformers_engine import TransformersEngine
from actors.settings import EngineSettings
from cluster.contracts.errors import EngineFailure, Retryable, UserError, WeightMismatch
from cluster.contracts.records import Completion, VersionSpan

EXACT = 1e-4
STOP = 1
KEYS = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module", params=["LlamaConfig", "Gemma2Config"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**KEYS, tie_word_embeddings=True)
    made = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    disturb(made, 1)
    made.save_pretrained(tmp_path / "model")
    return made


@torch.no_grad()
def disturb(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def engine(tmp_path: Path, **keys: Any) -> TransformersEngine:
    return TransformersEngine(
        EngineSettings(
            **{
                "model_path": str(tmp_path / "model"),
                "max_tokens": 12,
                "stop_token_ids": (STOP,),
                "max_model_len": 64,
                "max_running": 4,
                "temperature": 0.7,
                "seed": 2,
                **keys,
            }
        )
    )


PROMPTS = {f"r{i}": [3 + (i * 7 + j * 3) % 50 for j in range(4 + 3 * i)] for i in range(7)}


def arrays(model: Any) -> dict[str, Any]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@torch.no_grad()
def off(model: Any, ids: list[int], done: Completion) -> torch.Tensor:
    whole = torch.tensor(ids + list(done.token_ids))
    logprobs = torch.log_softmax(model(whole[None]).logits[0, :-1] / 0.7, -1)
    exact = logprobs.gather(1, whole[1:, None])[len(ids) - 1 :, 0]
    return (exact - torch.tensor(done.logprobs)).abs()


def test_sampled_log_probabilities_are_exact(model: Any, tmp_path: Path) -> None:
    made = engine(tmp_path)
    for name, ids in PROMPTS.items():
        made.submit(name, ids, None)
    done: dict[str, Completion] = {}
    while made.unfinished:
        done.update(made.step())
    assert set(done) == set(PROMPTS)
    for name, completion in done.items():
        assert float(off(model, PROMPTS[name], completion).max()) < EXACT
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == STOP)
        assert completion.versions[0].version == -1


def test_without_weights_on_disk_it_computes_with_the_published_ones(
    model: Any, tmp_path: Path
) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        engine(tmp_path)
    made = engine(tmp_path, weights="published")
    made.stage(arrays(model).items(), 0)
    made.swap(0)
    made.prove()
    for name, ids in PROMPTS.items():
        made.submit(name, ids, None)
    done: dict[str, Completion] = {}
    while made.unfinished:
        done.update(made.step())
    for name, completion in done.items():
        assert float(off(model, PROMPTS[name], completion).max()) < EXACT
        assert [span.version for span in completion.versions] == [0]


def test_no_answer_ends_before_the_shortest_length(model: Any, tmp_path: Path) -> None:
    stops = tuple(range(0, 60, 2))  # half the vocabulary: without the limit all would end at once
    made = engine(tmp_path, min_tokens=5, stop_token_ids=stops)
    for name, ids in PROMPTS.items():
        made.submit(name, ids, None)
    done: dict[str, Completion] = {}
    while made.unfinished:
        done.update(made.step())
    assert min(len(c.token_ids) for c in done.values()) == 6
    assert all(token % 2 for c in done.values() for token in c.token_ids[:5])


def load(made: Any, update: dict[str, Any], version: int) -> None:
    made.stage(update.items(), version)
    made.swap(version)


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_a_swap_in_flight(model: Any, tmp_path: Path, mode: str) -> None:
    made = engine(tmp_path, kv_on_swap=mode, stop_token_ids=())
    new = copy.deepcopy(model)
    disturb(new, 5)
    for name, ids in PROMPTS.items():
        made.submit(name, ids, None)
    done: dict[str, Completion] = {}
    for _ in range(5):
        done.update(made.step())
    load(made, arrays(new), 0)
    while made.unfinished:
        done.update(made.step())
    mixed = 0.0
    for name, completion in done.items():
        ids = PROMPTS[name]
        if int(name[1:]) < 4:
            assert completion.versions == (
                VersionSpan(version=-1, start=0, end=5),
                VersionSpan(version=0, start=5, end=12),
            )
            assert float(off(model, ids, completion)[:5].max()) < EXACT
            mixed = max(mixed, float(off(new, ids, completion)[5:].max()))
        else:
            assert completion.versions == (VersionSpan(version=0, start=0, end=12),)
            assert float(off(new, ids, completion).max()) < EXACT
    assert mixed < EXACT if mode == "recompute" else mixed > 100 * EXACT


@torch.no_grad()
def test_canary_log_probabilities_ignore_the_temperature(model: Any, tmp_path: Path) -> None:
    made = engine(tmp_path)
    new = copy.deepcopy(model)
    disturb(new, 6)
    load(made, arrays(new), 3)
    ids = torch.tensor(PROMPTS["r5"])
    exact = torch.log_softmax(new(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    got = torch.tensor(made.sequence_logprobs(PROMPTS["r5"]))
    assert float((got - exact).abs().max()) < EXACT


@torch.no_grad()
def test_nothing_changes_before_the_swap_and_the_two_sets_alternate(
    model: Any, tmp_path: Path
) -> None:
    made = engine(tmp_path)
    ids = PROMPTS["r5"]
    for version in range(4):
        before = made.sequence_logprobs(ids)
        disturb(model, 20 + version)
        made.stage(arrays(model).items(), version)
        assert made.sequence_logprobs(ids) == before
        made.swap(version)
        tokens = torch.tensor(ids)
        logits = model(tokens[None]).logits[0, :-1]
        exact = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
        got = torch.tensor(made.sequence_logprobs(ids))
        assert float((got - exact).abs().max()) < EXACT
        assert made.version == version


def test_a_failure_half_way_in_staging_leaves_the_old_weights(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(tmp_path)
    before = made.sequence_logprobs(PROMPTS["r2"])
    disturb(model, 8)
    update = arrays(model)
    seen: list[Any] = []

    def fails(array: Any) -> torch.Tensor:
        seen.append(array)
        if len(seen) > 3:
            raise MemoryError("no room")
        return torch.from_numpy(array)

    with monkeypatch.context() as patch:
        patch.setattr(host_tensors, "to_tensor", fails)
        with pytest.raises(Retryable, match="version 0, version -1 stays in force: no room"):
            made.stage(update.items(), 0)
    with pytest.raises(EngineFailure, match="staged is None"):
        made.swap(0)
    assert made.sequence_logprobs(PROMPTS["r2"]) == before
    load(made, update, 0)
    assert made.sequence_logprobs(PROMPTS["r2"]) != before


def test_an_update_that_does_not_fit_changes_nothing(model: Any, tmp_path: Path) -> None:
    made = engine(tmp_path)
    before = made.sequence_logprobs(PROMPTS["r2"])
    new = copy.deepcopy(model)
    disturb(new, 7)
    update = arrays(new)
    first = next(iter(update))
    for wrong in (
        {name: a for name, a in update.items() if name != first},
        {**update, "more": update[first]},
        {**update, first: update[first][:-1]},
    ):
        with pytest.raises(WeightMismatch, match="does not fit"):
            load(made, wrong, 0)
    assert made.sequence_logprobs(PROMPTS["r2"]) == before
    assert made.version == -1


@torch.no_grad()
def optimiser_step(model: Any, lr: float, seed: int) -> None:
    """What AdamW does at its first step: each number moves by lr, up or down."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).sign() * lr)


def published(model: Any, dtype: str) -> dict[str, Any]:
    """As the learner publishes in `dtype`: float32 masters, rounded once."""
    wanted = getattr(torch, dtype)
    found = {name: p.detach().to(wanted).clone() for name, p in model.named_parameters()}
    if dtype == "bfloat16":
        return {name: tensor.view(torch.uint16).numpy() for name, tensor in found.items()}
    return {name: tensor.numpy() for name, tensor in found.items()}


def _nothing(self: TransformersEngine, version: int) -> None:
    self.version, self._staged = version, None


def _half(self: TransformersEngine, version: int) -> None:
    for name in list(self._parameters)[::2]:
        held, staged = self._parameters[name], self._second[name]
        held.data, staged.data = staged.data, held.data
    _nothing(self, version)


def _there_and_back(self: TransformersEngine, version: int) -> None:
    for _ in range(2):
        self._staged = version
        TransformersEngine.swap(self, version)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sabotage", [_nothing, _half, _there_and_back])
def test_a_swap_that_does_not_do_its_work_is_caught(
    model: Any, tmp_path: Path, dtype: str, sabotage: Any
) -> None:
    """At a learning rate of 1e-7, where no log-probability moves measurably."""
    made = engine(tmp_path, dtype=dtype)
    load(made, published(model, dtype), 0)
    made.prove()
    optimiser_step(model, 1e-7, 3)
    made.stage(published(model, dtype).items(), 1)
    sabotage(made, 1)
    with pytest.raises(WeightMismatch, match="was to serve version 1, but"):
        made.prove()
    optimiser_step(model, 1e-7, 4)
    load(made, published(model, dtype), 2)
    made.prove()


def test_tensors_of_a_device_transport_are_proven_as_arrays_are(model: Any, tmp_path: Path) -> None:
    made = engine(tmp_path)
    disturb(model, 9)
    load(made, {name: p.detach() for name, p in model.named_parameters()}, 0)
    made.prove()
    made._parameters["model.norm.weight"].data[0] += 1e-6
    with pytest.raises(WeightMismatch, match=r"1 of the tensors .*: model.norm.weight"):
        made.prove()


def test_seeds_prompts_and_aborts(model: Any, tmp_path: Path) -> None:
    made = engine(tmp_path)
    answers = []
    for seed in (5, 5, 6):
        made.submit("a", PROMPTS["r0"], seed)
        done: dict[str, Completion] = {}
        while made.unfinished:
            done.update(made.step())
        answers.append(done["a"].token_ids)
    assert answers[0] == answers[1] != answers[2]
    for bad in ([], [60], [-1], [5] * 60):
        with pytest.raises(UserError):
            made.submit("b", bad, None)
    for name, ids in PROMPTS.items():
        made.submit(name, ids, None)
    rest = {name for name, _ in made.step()}
    assert "r1" not in rest
    made.abort(["r1", "r6"])  # one that runs, one that waits
    while made.unfinished:
        rest |= {name for name, _ in made.step()}
    assert rest == set(PROMPTS) - {"r1", "r6"}


def test_what_is_drawn_with_a_seed_of_its_own_leaves_the_other_completions_as_they_are(
    model: Any, tmp_path: Path
) -> None:
    def run(*drawn: tuple[str, float | None]) -> tuple[dict[str, Completion], ...]:
        made, found = engine(tmp_path), []
        batches = [[("r0", None)], [(name, warmth) for name, warmth in drawn], [("r1", None)]]
        for batch in batches:
            for name, warmth in batch:
                seed = 5 if (name, warmth) in drawn else None
                made.submit(name, PROMPTS[name], seed, warmth)
            done: dict[str, Completion] = {}
            while made.unfinished:
                done.update(made.step())
            found.append(done)
        return tuple(found)

    alone = run()
    beside = run(("r2", None), ("r3", 1e-4))
    assert (alone[0], alone[2]) == (beside[0], beside[2])
    cold = beside[1]["r3"]
    likeliest = model(torch.tensor([PROMPTS["r3"]])).logits[0, -1].argmax()
    assert cold.token_ids[0] == int(likeliest)
    assert float(cold.logprobs[0]) == pytest.approx(0.0, abs=1e-3)
    assert run(("r2", None))[1]["r2"].token_ids == beside[1]["r2"].token_ids  # by its seed alone
