"""Reward models and ensembles from a file to a directory that scores."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.offline import FitConfig, PairsConfig, RewardModelConfig
from cluster.contracts.config.reward import RewardModelSource
from cluster.contracts.errors import UserError
from learner.compute.microbatches import token_row
from learner.models.heads import reward_scores
from learner.models.load import (
    ValueModel,
    load_reward_members,
    load_reward_model,
    load_sequence_classifier,
    load_tokenizer,
)
from learner.models.reward_artifact import FILE
from learner.offline.datasets import read_rankings
from learner.offline.reward import spread_over, train_reward_model
from learner.offline.reward_figures import drift, held_out_figures
from learner.offline.reward_rows import RewardRow, bootstrap, encode
from learner.offline.reward_saving import reward_padding_id
from learner.offline.reward_task import RewardTask, pair_metrics
from reward_service.source import Part, ScoreItem
from reward_service.sources.model import ModelScorer

FAST = FitConfig(epochs=12, lr=3e-3, rows_per_step=16, tokens_per_microbatch=512, eval_every=1000)
ROW = RewardRow((token_row([5, 6], [False, True]),) * 2)


def pairs_file(folder: Path, count: int = 96) -> str:
    """The good answer says "great", the bad one "broken"; all else is noise."""
    rng, lines = random.Random(0), []
    for i in range(count):
        filler = rng.choice(["battery", "screen", "hours"])
        row = {
            "topic": filler,
            "prompt": [{"role": "user", "content": f"how is the {filler} {i}"}],
            "chosen": [{"role": "assistant", "content": f"great {filler}" + " yes" * (i % 4)}],
            "rejected": [{"role": "assistant", "content": f"broken {filler}" + " yes" * (i % 3)}],
        }
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "pairs.jsonl")


def model(path: Path) -> ModelConfig:
    return ModelConfig(path=str(path))


@pytest.fixture(scope="module")
def reward_dir(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    centre = [
        {"prompt": [{"role": "user", "content": f"how {i}"}], "completion": word}
        for i, word in enumerate(["great", "broken", "yes", "no"] * 3)
    ]
    (folder / "centre.jsonl").write_text(
        "\n".join(json.dumps(row) for row in centre), encoding="utf-8"
    )
    config = RewardModelConfig(
        model=model(tiny_policy),
        data=PairsConfig(path=pairs_file(folder)),
        fit=FAST.model_copy(update={"eval_fraction": 0.2}),
        policy_samples=str(folder / "centre.jsonl"),
        slice_key="topic",
    )
    return train_reward_model(config, folder / "run")


def test_reward_model_learns_what_is_separable(reward_dir: Path) -> None:
    evaluation = json.loads((reward_dir.parent / "fit.json").read_text())["evaluation"]
    assert evaluation["rm/accuracy"] >= 0.95
    assert evaluation["rm/loss"] < 0.2
    assert 0 <= evaluation["rm/ece"] < 0.2
    figures = json.loads((reward_dir.parent / "figures.json").read_text())
    bins = figures["reliability"]
    held_out = json.loads((reward_dir.parent / "fit.json").read_text())["rows_held_out"]
    assert sum(item["count"] for item in bins) == held_out
    gap = sum(b["count"] * abs(b["mean_probability"] - b["frequency"]) for b in bins) / held_out
    assert gap == pytest.approx(evaluation["rm/ece"], abs=1e-6)
    assert sum(found["pairs"] for found in figures["slices"].values()) == held_out
    assert figures["drift"]["samples"] == 12
    assert figures["length"]["accuracy_chosen_shorter"] >= 0.9
    _, artifact = load_reward_model(reward_dir)
    assert artifact.centred_on == "completions of the policy"
    assert artifact.normalise(artifact.centre_mean + 2 * artifact.centre_std) == pytest.approx(2)


def test_every_pair_can_be_trained_on(tiny_policy: Path, tmp_path: Path) -> None:
    config = RewardModelConfig(
        model=model(tiny_policy),
        data=PairsConfig(path=pairs_file(tmp_path, 6)),
        fit=FAST.model_copy(update={"eval_fraction": 0.0, "max_steps": 1}),
    )
    reward = train_reward_model(config, tmp_path / "run")
    assert (reward / FILE).is_file()
    assert json.loads((tmp_path / "run" / "fit.json").read_text())["rows_held_out"] == 0
    assert json.loads((tmp_path / "run" / "figures.json").read_text()) == {}


@torch.no_grad()
def test_it_says_how_far_bfloat16_is_off(reward_dir: Path) -> None:
    scorer, artifact = load_reward_model(reward_dir)
    found = artifact.bfloat16_error
    assert found is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = [torch.tensor([row.token_ids]) for row in artifact.golden]
        short = [float(reward_scores(scorer, one, torch.ones_like(one))[0]) for one in ids]
    off = [abs(a - row.score) for a, row in zip(short, artifact.golden, strict=True)]
    assert found == pytest.approx(max(off), rel=0.05, abs=1e-4)
    assert found > 0
    # Half of what a service accepts: a tenth of the scores' deviation.
    at_most = 0.05 * artifact.centre_std
    assert not replace(artifact, bfloat16_error=at_most).keeps_scores_in_bfloat16
    assert replace(artifact, bfloat16_error=0.99 * at_most).keeps_scores_in_bfloat16
    assert not replace(artifact, bfloat16_error=None).keeps_scores_in_bfloat16


@torch.no_grad()
def test_padding_does_not_move_scores_and_transformers_agrees(reward_dir: Path) -> None:
    scorer, artifact = load_reward_model(reward_dir)
    rows = [list(row.token_ids) for row in artifact.golden] + [[9, 8, 7, 4]]
    width = max(map(len, rows)) + 3
    pad = scorer.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    batch = reward_scores(scorer, ids, mask)
    for row, score in zip(rows, batch, strict=True):
        alone = torch.tensor([row])
        one = reward_scores(scorer, alone, torch.ones_like(alone))[0]
        torch.testing.assert_close(one, score, rtol=1e-5, atol=1e-5)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(reward_dir).eval()
    logits = theirs(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(logits, batch, rtol=1e-5, atol=1e-5)
    # What stands under the mask is never looked at.
    ids[mask == 0] = 5
    torch.testing.assert_close(reward_scores(scorer, ids, mask), batch, rtol=1e-5, atol=1e-5)


def test_value_network_starts_as_the_normalised_score(reward_dir: Path) -> None:
    _, artifact = load_reward_model(reward_dir)
    ids = torch.tensor([artifact.golden[0].token_ids])
    with torch.no_grad():
        values = ValueModel.from_reward_model(reward_dir)(ids, torch.ones_like(ids))
    assert values.shape == ids.shape
    expected = artifact.normalise(artifact.golden[0].score)
    assert float(values[0, -1]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_changed_reward_weights_are_noticed(reward_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in reward_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    load_reward_model(copy)
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {**tensors, "score.weight": tensors["score.weight"] + 0.3}, copy / "model.safetensors"
    )
    with pytest.raises(UserError, match="when it was saved"):
        load_reward_model(copy)
    (copy / FILE).unlink()
    with pytest.raises(UserError, match="not a reward model made by Accord"):
        load_reward_model(copy)


def test_padding_id_never_ends_an_answer(tiny_policy: Path) -> None:
    tokenizer = load_tokenizer(tiny_policy)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert reward_padding_id(tokenizer, [end]) == pad
    tokenizer.pad_token = tokenizer.eos_token
    assert reward_padding_id(tokenizer, [end]) == pad  # "<|pad|>" is still there, and free
    with pytest.raises(UserError, match="also an end token"):
        reward_padding_id(tokenizer, [end, pad])


def test_calibration_by_hand() -> None:
    # Certainty 0.75 (gap log 3), right in 3 of 4; certainty 0.9 (gap log 9), right in 0 of 1.
    gaps = [math.log(3)] * 3 + [-math.log(3), -math.log(9)]
    measured = pair_metrics([ROW] * 5, [np.array([gap, 0.0]) for gap in gaps])
    numbers = {metric.name: metric.value for metric in measured}
    assert numbers["rm/ece"] == pytest.approx((4 * 0.0 + 1 * 0.9) / 5, abs=1e-6)
    assert numbers["rm/accuracy"] == pytest.approx(0.6)
    assert numbers["rm/margin"] == pytest.approx((2 * math.log(3) - math.log(9)) / 5)
    expected = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 5
    assert numbers["rm/loss"] == pytest.approx(expected)


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def mixed(count: int) -> list[dict[str, Any]]:
    """Rankings, pairs and ties: great beats good beats bad; the two greats are equal."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        prompt = [{"role": "user", "content": f"how is it {i}"}]
        rows += [
            {
                "prompt": prompt,
                "completions": ["bad", "great", "good hours"],
                "ranks": [3, 1, 2],
                "weight": 2,
            },
            {"prompt": prompt, "chosen": "great", "rejected": "bad", "annotator": "ann"},
            {"prompt": prompt, "chosen": "great yes", "rejected": "great no", "tie": True},
        ]
    return rows


@pytest.mark.parametrize("share", [True, False], ids=["heads", "models"])
def test_an_ensemble_learns_rankings_pairs_and_ties_and_is_one_scorer(
    tiny_policy: Path, tmp_path: Path, share: bool
) -> None:
    config = RewardModelConfig(
        model=model(tiny_policy),
        data=PairsConfig(path=rows_file(tmp_path, mixed(16))),
        fit=FAST.model_copy(update={"eval_fraction": 0.2, "epochs": 6}),
        members=3,
        share_trunk=share,
        ranking_loss="plackett-luce",
        tie_threshold=0.5,
        use_weight=True,
        annotator_weights={"ann": 0.5},
        centre_coef=0.01,
        nll_coef=0.01,
    )
    told: list[tuple[int, float]] = []
    saved = train_reward_model(config, tmp_path / "run", lambda s, f, n: told.append((s, f)))
    assert saved == tmp_path / "run" / "reward_model"
    assert not (tmp_path / "run" / "members").exists()
    assert [fraction for _, fraction in told] == sorted(fraction for _, fraction in told)
    assert told[-1][1] == 1.0
    evaluation = json.loads((tmp_path / "run" / "fit.json").read_text())["evaluation"]
    assert evaluation["rm/accuracy"] >= 0.95
    ensemble = json.loads((tmp_path / "run" / "figures.json").read_text())["ensemble"]
    assert ensemble["members"] == 3
    assert ensemble["disagreement"] > 0
    assert ensemble["agreement"] >= 0.9
    members = load_reward_members(saved)
    assert len(members) == (1 if share else 3)
    heads = {tuple(head) for net, _ in members for head in net.score.weight.tolist()}
    assert len(heads) == 3  # they are not copies of one another

    def part(text: str, **how: Any) -> Part:
        scorer = ModelScorer(RewardModelSource(path=str(saved), **how))
        messages = ({"role": "user", "content": "how is it 3"},)
        return scorer.score([ScoreItem(id="i", messages=messages, response=text)])[0]

    great, bad = part("great"), part("bad")
    assert great.value > 0.5 > -0.5 > bad.value
    names = [f"member{i}" for i in range(3)]
    own = [great.detail[name] for name in names]
    assert great.value == pytest.approx(sum(own) / 3)
    assert great.detail["disagreement"] == pytest.approx(statistics.pstdev(own))
    assert part("great", combine="minimum").value == pytest.approx(min(own))
    careful = part("great", combine="uncertainty", uncertainty_coef=2.0).value
    assert careful == pytest.approx(great.value - 2 * great.detail["disagreement"])
    # A value network starts from the mean of the heads, or from the first of whole models.
    first, artifact = members[0]
    ids = torch.tensor([artifact.golden[0].token_ids])
    with torch.no_grad():
        values = ValueModel.from_reward_model(saved)(ids, torch.ones_like(ids))
        raw = float(reward_scores(first, ids, torch.ones_like(ids))[0])
    assert float(values[0, -1]) == pytest.approx(artifact.normalise(raw), rel=1e-4, abs=1e-4)


def test_with_nothing_held_out_it_trains_on_everything(tiny_policy: Path, tmp_path: Path) -> None:
    for members in (1, 2):
        folder = tmp_path / str(members)
        config = RewardModelConfig(
            model=model(tiny_policy),
            data=PairsConfig(path=pairs_file(tmp_path, 8)),
            members=members,
            fit=FAST.model_copy(update={"eval_fraction": 0.0, "epochs": 1}),
        )
        train_reward_model(config, folder)
        assert json.loads((folder / "fit.json").read_text())["rows"] == 8
        assert json.loads((folder / "figures.json").read_text()) == {}


def test_the_loss_is_the_sum_of_its_parts_and_does_not_see_microbatches(
    tiny_policy: Path, tmp_path: Path
) -> None:
    config = RewardModelConfig(
        model=model(tiny_policy),
        data=PairsConfig(path=rows_file(tmp_path, mixed(2))),
        ranking_loss="plackett-luce",
        tie_threshold=0.5,
        use_weight=True,
        annotator_weights={"ann": 0.5},
        members=2,
    )
    tokenizer = load_tokenizer(tiny_policy)
    read = read_rankings(config.data.path, rankings=True, ties=True).items
    rows = bootstrap([encode(tokenizer, row, config) for row in read], 2, seed=5)
    net = load_sequence_classifier(config.model, pad_token_id=0, heads=2)
    torch.nn.init.normal_(net.score.weight)
    task = RewardTask(net, config, torch.device("cpu"))
    total = sum(row.weight for row in rows)
    assert total == 2 * (2 + 0.5 + 1)
    whole = task.loss(rows, total)[0].item()
    parts = sum(task.loss(rows[i : i + 1], total)[0].item() for i in range(len(rows)))
    assert parts == pytest.approx(whole, rel=1e-5)
    expected = 0.0
    for row, own in zip(rows, task.score_rows(rows), strict=True):
        for head in range(2):
            s = own[:, head]
            if row.tie:
                a, b = (1 / (1 + math.exp(0.5 - sign * (s[0] - s[1]))) for sign in (1, -1))
                loss = -math.log((math.exp(1.0) - 1) * a * b)
            elif len(s) == 3:
                first = math.log(sum(math.exp(x) for x in s)) - s[0]
                loss = first + math.log(math.exp(s[1]) + math.exp(s[2])) - s[1]
            else:
                loss = math.log1p(math.exp(0.5 - (s[0] - s[1])))
            expected += row.weight * row.heads[head] * loss / 2 / total
    assert whole == pytest.approx(expected, rel=1e-5)


def test_figures_by_hand() -> None:
    short, long = token_row([5, 6], [False, True]), token_row([5, 6, 7, 8], [False] + [True] * 3)
    rows = [
        RewardRow((short, long), slice="a"),  # right
        RewardRow((long, short), slice="a"),  # wrong
        RewardRow((long, short), slice="b"),  # right
    ]
    scores = [np.array([[1.0, 3.0], [1.0, 1.0]]), np.array([[0.0, 0], [2, 2]]), np.eye(2) * [2, 1]]
    found = held_out_figures(rows, scores)
    assert found["slices"] == {
        "a": {"pairs": 2, "accuracy": 0.5},
        "b": {"pairs": 1, "accuracy": 1.0},
    }
    length = found["length"]
    assert length["accuracy_chosen_shorter"] == 1.0
    assert length["accuracy_chosen_longer"] == 0.5
    assert length["share_chosen_longer"] == pytest.approx(2 / 3)
    ensemble = found["ensemble"]
    assert ensemble["disagreement"] == pytest.approx((1 + 0 + 0 + 0 + 1 + 0.5) / 6)
    # First pair: (right, wrong for equal scores... the second member); third: (right, wrong).
    assert ensemble["agreement"] == pytest.approx((0 + 1 + 0) / 3)
    assert ensemble["mean_member_accuracy"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    training, samples = np.array([[0.0, 2.0], [2.0, 4.0]]), np.array([[5.0, 5.0], [5.0, 9.0]])
    moved = drift(training, samples)
    assert moved["shift"] == pytest.approx((6 - 2) / 1)
    assert moved["spread"] == pytest.approx(1.0)
    assert moved["disagreement_ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"chosen": "great", "rejected": "bad"}, {"use_margin": True}, "has no margin"),
        ({"chosen": "a", "rejected": "b", "tie": True}, {}, "is a tie, but tie_threshold is 0"),
        (
            {"completions": ["a", "b", "c"], "ranks": [1, 2, 3]},
            {"label_smoothing": 0.1, "ranking_loss": "plackett-luce"},
            "label_smoothing is for pairs",
        ),
        ({"chosen": "a", "rejected": "b"}, {"slice_key": "topic"}, "has no column 'topic'"),
        ({"ranking": ["a"]}, {}, "column 'ranking' holds"),
        ({"ranking": ["a", "b"], "tie": True}, {}, "a ranking cannot be a tie"),
        ({"ranking": ["a", "b"], "weight": 0}, {"use_weight": True}, "column 'weight' holds 0"),
    ],
    ids=["margin", "tie", "smoothing", "slice", "one", "ranked-tie", "weight"],
)
def test_what_a_row_lacks_or_a_key_cannot_use_is_named(
    tiny_policy: Path, tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    prompt = [{"role": "user", "content": "how"}]
    data = PairsConfig(path=rows_file(tmp_path, [{"prompt": prompt, **row}]))
    config = RewardModelConfig(model=model(tiny_policy), data=data, **settings)
    with pytest.raises(UserError, match=f"line 1: .*{said}"):
        train_reward_model(config, tmp_path / "run")


def test_of_many_completions_some_are_scored_evenly_spaced() -> None:
    assert spread_over([1, 2, 3], 3) == [1, 2, 3]
    assert spread_over(range(10), 4) == [0, 2, 5, 7]
    assert spread_over(range(10), 0) == [0]
