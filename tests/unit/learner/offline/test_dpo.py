"""Every preference loss from a file to a saved policy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.file import check_config
from cluster.contracts.config.offline import DpoConfig, FitConfig, PairsConfig
from cluster.contracts.errors import UserError
from learner.models.load import load_policy, load_tokenizer
from learner.offline.completion_logps import all_completion_logps
from learner.offline.datasets import read_preferences
from learner.offline.dpo import DpoTask, train_dpo
from learner.offline.own_samples import sample
from learner.offline.preference_rows import JudgedRow, encode, encode_judged, mismatch, prompt_of

CPU = torch.device("cpu")
FAST = FitConfig(
    epochs=3,
    lr=3e-3,
    rows_per_step=16,
    tokens_per_microbatch=512,
    eval_every=1000,
    eval_fraction=0.2,
    max_tokens=32,
    schedule="constant",
)
START = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}


def question(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"how is the {['battery', 'screen'][i % 2]} {i}"}]


def pair(i: int) -> dict[str, Any]:
    return {"prompt": question(i), "chosen": "great" + " yes" * (i % 3), "rejected": "broken"}


def single(i: int) -> dict[str, Any]:
    good = i % 3 > 0
    return {"prompt": question(i), "completion": "great" if good else "broken", "label": good}


def file_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def config_of(policy: Path, data: str, **settings: Any) -> DpoConfig:
    return DpoConfig(
        model=ModelConfig(path=str(policy)), data=PairsConfig(path=data), fit=FAST, **settings
    )


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_every_loss_starts_where_it_should_and_learns(
    tiny_policy: Path, tmp_path: Path, loss: Any
) -> None:
    data = file_of(tmp_path, [pair(i) for i in range(96)])
    nll = {} if loss == "orpo" else {"nll_coef": 0.01}
    config = config_of(tiny_policy, data, loss=loss, kl_samples=8, **nll)
    numbers: list[Any] = []
    saved = train_dpo(config, tmp_path / "run", lambda s, f, n: numbers.append(dict(n)))
    if loss in START:  # policy and reference are the same; the NLL term is on top
        assert 0 < numbers[0]["train/loss"] - START[loss] < 0.1
        assert numbers[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    last = json.loads((tmp_path / "run" / "fit.json").read_text())["evaluation"]
    assert last["eval/rewards/accuracies"] >= 0.95
    assert last["eval/rewards/chosen"] > last["eval/rewards/rejected"]
    assert last["eval/kl"] > 0.1
    assert 1 <= last["eval/length"] <= 32
    assert numbers[-1]["eval/kl"] == last["eval/kl"]
    assert load_policy(ModelConfig(path=str(saved))) is not None


def test_kto_learns_from_single_completions_and_from_pairs_beside_them(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [single(i) for i in range(90)] + [pair(i) for i in range(90, 120)]
    config = config_of(tiny_policy, file_of(tmp_path, rows), loss="kto", kl_samples=0)
    train_dpo(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "fit.json").read_text())
    last = summary["evaluation"]
    assert last["eval/rewards/accuracies"] >= 0.95
    assert last["eval/rewards/chosen"] > 0 > last["eval/rewards/rejected"]
    assert last["eval/kto/kl"] >= 0
    assert summary["rows"] + summary["rows_held_out"] == 120
    asked: list[int] = []
    monkeypatch.setattr(
        DpoTask, "measure_reference_point", lambda task, rows: asked.append(len(rows))
    )
    short = config.fit.model_copy(update={"max_steps": 2, "eval_fraction": 0.0})
    train_dpo(config.model_copy(update={"fit": short}), tmp_path / "short")
    assert asked == [16, 16]  # once per step, with all its rows, which are several microbatches
    with pytest.raises(UserError, match=r"line 1: judges a single completion") as refused:
        train_dpo(config_of(tiny_policy, config.data.path, loss="simpo"), tmp_path / "other")
    assert "loss='kto'" in str(refused.value.fix)


def test_the_reference_is_the_starting_policy_and_losses_do_not_see_microbatches(
    tiny_policy: Path, tmp_path: Path
) -> None:
    rows = [pair(i) for i in range(5)] + [single(i) for i in range(5, 9)]
    config = config_of(tiny_policy, file_of(tmp_path, rows), loss="kto", desirable_weight=1.5)
    tokenizer, policy = load_tokenizer(tiny_policy), load_policy(config.model)
    task = DpoTask(policy, config, CPU)
    read = read_preferences(config.data.path, singles=True).items
    known = task.with_reference(
        mismatch([encode_judged(tokenizer, row) for row in read], 0, max_tokens=20)
    )
    for row in known[:5]:
        assert row.rejected is not None
        ids = torch.as_tensor(row.rejected.input_ids).long()[None]
        with torch.no_grad():
            logp = policy(input_ids=ids).logits[0].log_softmax(-1)
        mask = row.rejected.loss_mask
        wanted = sum(float(logp[t - 1, ids[0, t]]) for t in range(len(mask)) if mask[t])
        assert row.ref_rejected == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    task.measure_reference_point(known)
    total = sum(row.weight for row in known)
    assert total == 14.0
    whole = task.loss(known, total)[0].item()
    parts = sum(task.loss(known[i : i + 2], total)[0].item() for i in range(0, 9, 2))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_mismatched_completions_are_of_other_prompts_and_cut(
    tiny_policy: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_policy)
    texts = ["great", "broken yes yes yes", "hours"]
    data = file_of(tmp_path, [{**single(i), "completion": t} for i, t in enumerate(texts)])
    rows = [encode_judged(tokenizer, row) for row in read_preferences(data, singles=True).items]
    length = len(prompt_of(rows[0].sides[0]))
    done = mismatch(rows, seed=3, max_tokens=length + 2)
    for row, made in zip(rows, done, strict=True):
        assert isinstance(made, JudgedRow)
        assert made.mismatched is not None
        assert len(made.mismatched) <= length + 2
        assert prompt_of(made.mismatched).tolist() == prompt_of(row.sides[0]).tolist()
        own = row.sides[0].input_ids[length : length + 2].tolist()
        assert made.mismatched.input_ids[length:].tolist() != own
    alone = mismatch([rows[0], rows[0]], seed=0, max_tokens=99)
    assert [row.mismatched for row in alone] == [None, None]


def test_own_samples_end_where_they_should(tiny_policy: Path) -> None:
    policy, tokenizer = load_policy(ModelConfig(path=str(tiny_policy))), load_tokenizer(tiny_policy)
    state = torch.random.get_rng_state()
    prompts = [(5, 6, 7), (8, 9)]
    rows = sample(policy, prompts, 12, [tokenizer.eos_token_id], 1, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    for row, prompt in zip(rows, prompts, strict=True):
        assert tuple(row.input_ids[: len(prompt)]) == prompt
        ended = row.input_ids[-1] == tokenizer.eos_token_id
        assert ended or len(row) == 12
        assert tokenizer.eos_token_id not in row.input_ids[len(prompt) : -1]
    again = sample(policy, prompts, 12, [tokenizer.eos_token_id], 1, CPU)
    assert [r.input_ids.tolist() for r in again] == [r.input_ids.tolist() for r in rows]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "beta / (1 - 2 label_smoothing)"),
        ({"loss": "kto", "label_smoothing": 0.1}, "no pair whose order could be wrong"),
        ({"loss": "kto", "reference_free": True}, "needs the reference"),
        ({"loss": "kto", "length_normalised": True}, "nats per completion"),
        ({"loss": "orpo", "nll_coef": 1.0}, "this term with weight 1"),
        ({"loss": "simpo", "length_normalised": True}, "simpo is always so"),
        ({"loss": "dpo", "target_margin": 0.5}, "belongs to loss = 'simpo'"),
        ({"loss": "dpo", "undesirable_weight": 2}, "belongs to loss = 'kto'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value)),
)
def test_what_a_loss_has_no_use_for_is_refused_with_a_reason(
    settings: dict[str, Any], said: str
) -> None:
    tree = {"model": {"path": "x"}, "data": {"path": "y"}, **settings}
    with pytest.raises(UserError) as refused:
        check_config(DpoConfig, tree, where="t")
    assert said in str(refused.value)


def test_simpo_has_a_beta_of_its_own() -> None:
    def beta(**settings: Any) -> float:
        return config_of(Path("x"), "y", **settings).beta

    assert (beta(), beta(loss="orpo"), beta(loss="simpo"), beta(loss="simpo", beta=3)) == (
        0.1, 0.1, 2.0, 3.0,
    )  # fmt: skip


def test_length_normalised_and_reference_free_say_what_the_loss_sees(
    tiny_policy: Path, tmp_path: Path
) -> None:
    data = file_of(tmp_path, [pair(i) for i in range(2)])
    tokenizer, policy = load_tokenizer(tiny_policy), load_policy(ModelConfig(path=str(tiny_policy)))
    rows = [encode(tokenizer, row) for row in read_preferences(data).items]
    plain = DpoTask(policy, config_of(tiny_policy, data, reference_free=True), CPU)
    known = plain.with_reference(rows)
    assert known[0].ref_chosen == 0.0
    sides = [row.chosen for row in rows if row.chosen is not None]
    chosen = all_completion_logps(policy, sides, "float32", CPU, 512)
    measured = {m.name: m.value for m in plain.measure(known)}
    assert measured["eval/rewards/chosen"] == pytest.approx(0.1 * sum(chosen) / 2, rel=1e-5)
    means = DpoTask(
        policy, config_of(tiny_policy, data, reference_free=True, length_normalised=True), CPU
    )
    tokens = [side.trained for side in sides]
    expected = 0.1 * sum(c / t for c, t in zip(chosen, tokens, strict=True)) / 2
    measured = {m.name: m.value for m in means.measure(known)}
    assert measured["eval/rewards/chosen"] == pytest.approx(expected, rel=1e-5)
