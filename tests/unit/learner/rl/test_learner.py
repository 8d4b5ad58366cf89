"""PPOLearner: invariances, checkpoints, the promises a step checks, what it writes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cluster.contracts import crash_points
from cluster.contracts.errors import Fatal, UserError
from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput
from learner.rl.learner import PPOLearner
from learner.rl.publish import host_arrays
from learner.rl.rollout_files import RolloutWriter

OWN = {"learner": {"value_model": "own", "value_lr": 3e-3}}
GROUPS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def tables(world: ModuleType, tiny: Path) -> list[pa.Table]:
    """Three steps of four groups, all sampled from the starting policy (versions 0)."""
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    return [
        world.table_of(world.make_groups(model, seed=step, first_group=4 * step))
        for step in range(3)
    ]


def _step(step: int, *payloads: Any) -> StepInput:
    return StepInput(step=step, group_ids=tuple(g + 4 * step for g in GROUPS), payloads=payloads)


def _started(world: ModuleType, tiny: Path, **settings: Any) -> tuple[PPOLearner, Any]:
    publisher = world.KeepingPublisher()
    learner = PPOLearner(world.make_settings(tiny, **settings), publisher)
    learner.start()
    return learner, publisher


def _largest_difference(one: Any, other: Any) -> float:
    return max(float(np.abs(one.arrays[name] - other.arrays[name]).max()) for name in one.arrays)


def _merged(*settings: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for part in settings:
        for key, value in part.items():
            out[key] = {**out.get(key, {}), **value} if isinstance(value, dict) else value
    return out


INVARIANCE: list[dict[str, Any]] = [
    {"algorithm": {"entropy_coef": 0.01}},
    {"algorithm": {"aggregate": "seq-mean-token-mean"}, **OWN},
    {"algorithm": {"advantage": "grpo", "truncated": "mask", "aggregate": "seq-mean-token-sum"}},
    {"algorithm": {"kl": {"place": "loss", "estimator": "k3+", "coef": 0.5}}},
]


@pytest.mark.parametrize("variant", INVARIANCE, ids=str)
def test_a_step_does_not_depend_on_how_minibatches_are_cut(
    world: ModuleType, tiny: Path, tables: list[pa.Table], variant: dict[str, Any]
) -> None:
    results = []
    for budget in (16, 48, 4096):
        # One plain gradient step: Adam would turn rounding of tiny gradients into whole steps.
        plain = {"learner": {"tokens_per_microbatch": budget, "minibatches": 2, "eps": 1.0}}
        learner, publisher = _started(world, tiny, **_merged(variant, plain, {"seed": 4}))
        metrics = values(learner.step(_step(0, tables[0])).metrics)
        results.append((publisher, metrics))
    first, expected = results[0]
    start = world.KeepingPublisher()
    PPOLearner(world.make_settings(tiny), start).start()
    moved = _largest_difference(first, start)
    assert moved > 0
    for publisher, metrics in results[1:]:
        assert _largest_difference(first, publisher) < 1e-3 * moved
        for name in ("policy/loss", "policy/grad_norm", "policy/entropy", "value/loss"):
            if name in expected:
                assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


def test_a_step_does_not_depend_on_arrival(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    one, kept_one = _started(world, tiny)
    one.step(_step(0, tables[0]))
    table = tables[0]
    backwards = table.take(list(range(len(table) - 1, -1, -1)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(backwards.slice(3))
    other, kept_other = _started(world, tiny)
    mixed = pa.concat_tables([tables[1], backwards.slice(0, 3)])
    # Rows of another step ride along, rows are split over payloads, one of them as bytes.
    batch = StepInput(step=0, group_ids=(2, 0, 3, 1), payloads=(sink.getvalue(), mixed))
    other.step(batch)
    assert all(np.array_equal(kept_one.arrays[n], kept_other.arrays[n]) for n in kept_one.arrays)


@pytest.mark.parametrize(
    "variant",
    [
        _merged(OWN, {"algorithm": {"kl": {"controller": "adaptive", "target": 0.1}}}),
        {"learner": {"value_warmup_steps": 1, "epochs": 2, "minibatches": 2}},
        {"algorithm": {"advantage": "rloo"}, "learner": {"schedule": "cosine", "warmup_steps": 4}},
    ],
    ids=["own-adaptive", "shared", "no-value"],
)
def test_save_restore_and_one_more_step_equals_no_interruption(
    world: ModuleType, tiny: Path, tables: list[pa.Table], tmp_path: Path, variant: dict[str, Any]
) -> None:
    whole, kept_whole = _started(world, tiny, **variant)
    for step in range(2):
        whole.step(_step(step, tables[step]))
    whole.save(tmp_path / "there")
    expected = whole.step(_step(2, tables[2]))
    resumed, kept_resumed = _started(
        world, tiny, **variant, resume_from=str(tmp_path / "there"), canary_prompt=(9,)
    )
    assert resumed.state.version == 2
    got = resumed.step(_step(2, tables[2]))
    for name in kept_whole.arrays:
        assert np.array_equal(kept_whole.arrays[name], kept_resumed.arrays[name]), name
    assert got.manifest.canary == expected.manifest.canary
    assert got.manifest.tensors == expected.manifest.tensors
    same = ("objective/kl", "objective/kl_coef", "policy/loss", "policy/lr")
    ours, theirs = values(got.metrics), values(expected.metrics)
    assert [ours[name] for name in same] == [theirs[name] for name in same]
    whole.save(tmp_path / "one")
    resumed.save(tmp_path / "two")
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file() and path.name != "rng.safetensors":
            twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
            assert path.read_bytes() == twin.read_bytes(), path.name


def test_a_checkpoint_is_a_model_and_holds_no_pickle(
    world: ModuleType, tiny: Path, tables: list[pa.Table], tmp_path: Path
) -> None:
    learner, kept = _started(world, tiny, **OWN)
    learner.step(_step(0, tables[0]))
    learner.save(tmp_path)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".jinja"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), kept.arrays[name])


def test_a_checkpoint_of_other_settings_is_refused(
    world: ModuleType, tiny: Path, tmp_path: Path
) -> None:
    learner, _ = _started(world, tiny, **OWN)
    learner.save(tmp_path)
    with pytest.raises(UserError, match="value network of the checkpoint is 'own'"):
        _started(world, tiny, resume_from=str(tmp_path))
    adaptive = {"algorithm": {"kl": {"controller": "adaptive"}}}
    with pytest.raises(UserError, match="KL controller"):
        _started(world, tiny, **_merged(OWN, adaptive), resume_from=str(tmp_path))
    (tmp_path / "state" / "rank-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        _started(world, tiny, **OWN, resume_from=str(tmp_path))
    (tmp_path / "trainer.json").unlink()
    with pytest.raises(UserError, match=r"trainer\.json"):
        _started(world, tiny, **OWN, resume_from=str(tmp_path))


def _without_group(table: pa.Table) -> pa.Table:
    return table.slice(2)


def _without_sample(table: pa.Table) -> pa.Table:
    return table.slice(1)


def _twice(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table.slice(0, 1)])


def _not_a_number(table: pa.Table) -> pa.Table:
    scores = table.column("score").to_pylist()
    scores[3] = float("nan")
    at = table.schema.get_field_index("score")
    return table.set_column(at, "score", pa.array(scores))


def _span_too_short(table: pa.Table) -> pa.Table:
    ends = table.column("span_end").to_pylist()
    ends[2] = [ends[2][-1] - 1]
    at = table.schema.get_field_index("span_end")
    return table.set_column(at, table.schema.field(at), pa.array(ends, type=pa.list_(pa.int32())))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without_group, r"groups \[0\] of this step are in none"),
        (_without_sample, r"groups \[0\] do not hold samples 0\.\.1"),
        (_twice, r"groups \[0\] do not hold samples 0\.\.1"),
        (_not_a_number, "not finite"),
        (_span_too_short, "version spans"),
    ],
)
def test_rollouts_that_break_a_promise_stop_the_step(
    world: ModuleType, tiny: Path, tables: list[pa.Table], change: Any, says: str
) -> None:
    learner, _ = _started(world, tiny)
    with pytest.raises(Fatal, match=says):
        learner.step(_step(0, change(tables[0])))
    assert learner.state.version == 0


def test_steps_come_in_order_and_within_the_bound(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    learner, _ = _started(world, tiny, staleness={"bound": 0})
    with pytest.raises(Fatal, match="step 1 was asked of a learner at version 0"):
        learner.step(_step(1, tables[1]))
    assert learner.step(_step(0, tables[0])).version == 1
    with pytest.raises(Fatal, match="older than the bound 0"):
        learner.step(_step(1, tables[1]))


def test_value_warmup_leaves_the_policy_and_trains_the_value(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    for own in ({}, OWN):
        # Two steps: a head that starts at zero passes no gradient on in its first.
        warm = {"learner": {"value_warmup_steps": 2}}
        learner, kept = _started(world, tiny, **_merged(own, warm))
        before = dict(kept.arrays)
        value = learner.state.networks.value
        assert value is not None
        for step in range(2):
            start = {name: p.detach().clone() for name, p in value.named_parameters()}
            metrics = values(learner.step(_step(step, tables[step])).metrics)
            assert all(np.array_equal(before[name], kept.arrays[name]) for name in before)
            assert any(not torch.equal(start[name], p) for name, p in value.named_parameters())
            assert "policy/loss" not in metrics
            assert metrics["value/loss"] > 0
        learner.step(_step(2, tables[2]))
        assert any(not np.array_equal(before[name], kept.arrays[name]) for name in before)


def test_a_policy_that_is_not_finite_is_never_published(
    world: ModuleType, tiny: Path, tables: list[pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, kept = _started(world, tiny)
    before = dict(kept.arrays)

    update = PPOLearner._update

    def break_weights(*given: Any) -> Any:
        result = update(*given)
        with torch.no_grad():
            learner.state.networks.policy.model.norm.weight[3] = torch.nan
        return result

    monkeypatch.setattr(PPOLearner, "_update", break_weights)
    with pytest.raises(Fatal, match=r"'model\.norm\.weight' is not finite"):
        learner.step(_step(0, tables[0]))
    assert all(np.array_equal(before[name], kept.arrays[name]) for name in before)


def test_trained_groups_are_written_and_a_failed_write_surfaces(
    world: ModuleType, tiny: Path, tables: list[pa.Table], tmp_path: Path
) -> None:
    learner, _ = _started(world, tiny, run_dir=str(tmp_path), save_rollouts=True)
    learner.step(_step(0, pa.concat_tables([tables[1], tables[0]])))
    learner.save(tmp_path / "checkpoint")
    written = pq.read_table(tmp_path / "rollouts" / "step-000000.parquet")
    assert written.equals(tables[0])
    for path in (tmp_path / "rollouts").iterdir():
        path.unlink()
    (tmp_path / "rollouts").rmdir()
    learner.step(_step(1, tables[1]))
    with pytest.raises(Fatal, match="cannot write rollouts"):
        learner.step(_step(2, tables[2]))
    learner.close()


def test_what_a_killed_learner_was_writing_goes_when_the_next_one_starts(tmp_path: Path) -> None:
    left, whole = tmp_path / ".step-000003.parquet.writing-77", tmp_path / "step-000002.parquet"
    left.write_bytes(b"PAR1")
    whole.write_bytes(b"PAR1")
    RolloutWriter(tmp_path).close()
    assert list(tmp_path.iterdir()) == [whole]


def test_a_full_disk_costs_rollouts_and_no_training(
    world: ModuleType,
    tiny: Path,
    tables: list[pa.Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner, _ = _started(world, tiny, run_dir=str(tmp_path), save_rollouts=True)
    replace_file = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "step-000000.parquet":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert learner.step(_step(0, tables[0])).not_written == ()
    told = learner.step(_step(1, tables[1])).not_written  # of the step before, written beside
    assert len(told) == 1
    assert "step-000000.parquet" in told[0]
    assert "No space left" in told[0]
    learner.close()
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-000001.parquet"]


def test_adaptive_kl_is_fed_the_trained_batch(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    kl = {"controller": "adaptive", "coef": 0.2, "target": 6.0, "horizon": 100}
    learner, _ = _started(world, tiny, algorithm={"kl": kl})
    metrics = values(learner.step(_step(0, tables[0])).metrics)
    assert metrics["objective/kl_coef"] == 0.2
    # KL 0 is clipped to an error of -0.2; 8 samples of a horizon of 100.
    assert learner.state.kl.coef == pytest.approx(0.2 * (1 - 0.2 * 8 / 100))


def test_the_rate_follows_the_schedule_by_learner_steps(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    rates = {"lr": 1e-3, "value_lr": 1e-2, "schedule": "linear", "warmup_steps": 2}
    learner, _ = _started(world, tiny, learner=rates, batch={"steps": 4})
    seen = [
        values(learner.step(_step(step, tables[step])).metrics)["policy/lr"] for step in range(3)
    ]
    assert seen == pytest.approx([5e-4, 1e-3, 1e-3])
    groups = learner.state.optimizers.policy.param_groups
    assert groups[-1]["lr"] == pytest.approx(1e-2)
    own, _ = _started(world, tiny, **_merged({"learner": rates}, {"learner": OWN["learner"]}))
    own.step(_step(0, tables[0]))
    assert own.state.optimizers.value is not None
    assert own.state.optimizers.value.param_groups[0]["lr"] == pytest.approx(3e-3 / 2)


def test_settings_that_cannot_work_are_refused(world: ModuleType, tiny: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"learner": {"value_model": "shared", "value_path": str(tiny)}},
        {"learner": {"value_path": str(tiny)}},
        {"learner": {"reference_path": "/nowhere/at/all"}},
        {"algorithm": {"kl": {"coef": 0.0, "controller": "adaptive"}}},
        {"canary_prompt": (99,)},
    ]
    for case in cases:
        with pytest.raises(UserError) as caught:
            _started(world, tiny, **case)
        assert caught.value.fix, case


def test_no_reference_is_kept_where_nothing_pays_for_it(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    learner, _ = _started(world, tiny, algorithm={"kl": {"coef": 0.0}})
    assert learner.state.networks.reference is None
    assert "objective/kl" not in values(learner.step(_step(0, tables[0])).metrics)
    named, _ = _started(
        world, tiny, algorithm={"kl": {"coef": 0.0}}, learner={"reference_path": str(tiny)}
    )
    assert "objective/kl" in values(named.step(_step(0, tables[0])).metrics)


def test_gradient_checkpointing_changes_nothing(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    plain, kept_plain = _started(world, tiny)
    saving, kept_saving = _started(world, tiny, learner={"gradient_checkpointing": True})
    plain.step(_step(0, tables[0]))
    saving.step(_step(0, tables[0]))
    assert _largest_difference(kept_plain, kept_saving) < 1e-6


def test_gradient_checkpointing_reaches_a_value_network_of_its_own(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    own: dict[str, Any] = {"value_model": "own"}
    heads = []
    for extra in ({}, {"gradient_checkpointing": True}):
        learner, _ = _started(world, tiny, learner={**own, **extra})
        value: Any = learner.state.networks.value
        assert value.trunk.is_gradient_checkpointing == bool(extra)
        learner.step(_step(0, tables[0]))
        heads.append(torch.cat([p.detach().flatten() for p in value.parameters()]))
    torch.testing.assert_close(heads[0], heads[1], atol=1e-6, rtol=0)


def test_numbers_of_a_step_are_complete_and_finite(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    learner, _ = _started(world, tiny)
    result = learner.step(_step(0, tables[0]))
    found = values(result.metrics)
    expected = {
        "objective": "kl kl_per_token entropy scores non_score_reward rlhf_reward kl_coef",
        "policy": "loss approxkl clipfrac clipfrac_low clipfrac_high entropy ratio_mean ratio_max "
        "grad_norm lr",
        "value": "loss clipfrac explained_var mean",
        "rewards": "mean std min max zero_std_frac own/mean own/std",
        "completions": "mean_length max_length clipped_ratio eos_rate",
        "async": "staleness_mean staleness_max ess",
        "sampling": "logp_diff_mean logp_diff_max logp_diff_all_mean is_ratio_mean "
        "is_clipped_frac veto_frac mismatch_kl",
        "perf": "tokens_per_s learner_busy_s learner_cpu_s mfu",
        "time": "experience forward backward publish step",
    }
    names = {f"{group}/{name}" for group, text in expected.items() for name in text.split()}
    assert names <= found.keys()
    assert all(np.isfinite(value) for value in found.values())
    json.dumps(found, allow_nan=False)
    scores = tables[0].column("score").to_numpy()
    assert found["rewards/mean"] == pytest.approx(scores.mean())
    assert found["rewards/std"] == pytest.approx(scores.std(ddof=1))
    assert found["rewards/zero_std_frac"] == 0.0
    ratio = np.mean([reason == "length" for reason in tables[0]["finish_reason"].to_pylist()])
    assert found["completions/clipped_ratio"] == pytest.approx(ratio)
    assert result.trained_tokens == sum(map(len, tables[0]["token_ids"].to_pylist()))


def test_while_it_trains_only_the_newest_version_and_the_one_being_sent_are_kept(
    world: ModuleType, tiny: Path, tables: list[pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, publisher = _started(world, tiny)
    kept: list[set[int]] = []
    monkeypatch.setattr(publisher, "retain", lambda versions: kept.append(set(versions)))
    for step, sending in enumerate((None, 0)):
        learner.step(dataclasses.replace(_step(step, tables[step]), sending=sending))
        assert len(kept) == step + 1  # at the start of each step, not once more at its end
    assert kept == [{0}, {0, 1}]


def test_huge_weights_are_finite_and_a_single_bad_one_is_not() -> None:
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.fill_(3e38)  # whose squares are not
    arrays, _ = host_arrays(model, "float32")
    assert np.isfinite(arrays["weight"]).all()
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            model.bias[1] = bad
        with pytest.raises(Fatal, match="'bias' is not finite"):
            host_arrays(model, "float32")


@pytest.mark.parametrize(
    "name", [name for name in crash_points.POINTS if name.startswith(crash_points.LEARNER)]
)
def test_each_crash_point_of_the_learner_is_passed(
    world: ModuleType,
    tiny: Path,
    tables: list[pa.Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(crash_points, "_end", ends.append)
    crash_points.arm(name)
    try:
        learner, _ = _started(world, tiny)
        assert ends == []  # a successor's start is not a step
        learner.step(_step(0, tables[0]))
        learner.save(tmp_path / "checkpoint")
    finally:
        crash_points.arm(None)
    assert ends == [137]


def _in_the_older_layout(learner: PPOLearner, source: Path, target: Path) -> None:
    """The checkpoint `source` of `learner`, as layout 1 had it: whole files, moments by number."""
    state = learner.state
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("state"))
    trainer = json.loads((source / "trainer.json").read_text())
    trainer["schema"] = "accord.trainer/1"
    optimizers = {"policy": state.optimizers.policy, "value": state.optimizers.value}
    for kind, optimizer in optimizers.items():
        if optimizer is None:
            continue
        given = optimizer.state_dict()
        moments = {
            f"{number}.{key}": tensor
            for number, row in given["state"].items()
            for key, tensor in row.items()
        }
        save_file(moments, target / f"optimizer_{kind}.safetensors")
        trainer["optimizers"][kind]["param_groups"] = given["param_groups"]
    if state.networks.value is not None:
        save_file(state.networks.value.state_dict(), target / "value.safetensors")
    (target / "trainer.json").write_text(json.dumps(trainer))


@pytest.mark.parametrize("variant", [OWN, {}], ids=["own", "shared"])
def test_a_checkpoint_of_an_older_version_is_resumed(
    world: ModuleType, tiny: Path, tables: list[pa.Table], tmp_path: Path, variant: dict[str, Any]
) -> None:
    whole, kept_whole = _started(world, tiny, **variant)
    whole.step(_step(0, tables[0]))
    whole.save(tmp_path / "new")
    _in_the_older_layout(whole, tmp_path / "new", tmp_path / "old")
    assert not (tmp_path / "old" / "state").exists()
    whole.step(_step(1, tables[1]))
    resumed, kept = _started(world, tiny, **variant, resume_from=str(tmp_path / "old"))
    resumed.step(_step(1, tables[1]))
    for name in kept_whole.arrays:
        assert np.array_equal(kept_whole.arrays[name], kept.arrays[name]), name
