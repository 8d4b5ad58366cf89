"""What `accord plan --probe` makes of a probe: the limit it names and the help it offers."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.assembly.core_record import KnownCosts
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.train import TrainConfig
from cluster.machine.cores import plan_cores
from cluster.machine.hardware import Machine
from cluster.machine.placement import StepCosts
from cluster.measure.plan import derived, evaluation_share, sizes, table, verdict
from cluster.measure.probe.engine import task_slots
from cluster.measure.probe.probe import Outlook, outlook


def config(**sections: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"prompts": "p.jsonl"},
            "reward": {"sources": [{"type": "rules"}]},
            "batch": {"prompts_per_step": 16, "samples_per_prompt": 4},
            **sections,
        }
    )


OTHERS_COST_NOTHING = StepCosts(workers=1, learner=1, reward=0, controller=0, ray=0)


def probed(
    given: TrainConfig, *, cores: int = 2, rate: float = 1600.0, learn_s: float = 1.0, **more: float
) -> Outlook:
    """64 samples of 50 tokens: 2 s of generation at 1600 tokens/s."""
    found = {
        "engine": {
            "tokens_per_s": rate,
            "mean_length": 50.0,
            "sample_s": more.get("sample_s", 2.0),
            "stall_s": 0.01,
            "first_batch_s": 3.0,
            "first_tokens": 3200,
            "cpu_share": more.get("cpu_share", 0.98),
        },
        "reward": {
            "score_s": 0.01,
            "scoring_s": more.get("scoring_s", 0.02),
            "scoring_cpu_s": more.get("scoring_s", 0.02),
        },
        "learner": {
            "learn_s": learn_s,
            "learn_cpu_s": learn_s,
            "publish_s": 0.03,
            "cpu_share": 1.0,
        },
    }
    plan = plan_cores(list(range(cores)), given.rollout.workers, pin=True)
    known = KnownCosts(OTHERS_COST_NOTHING, "measured by a run")
    return outlook(given, found, plan, cores, known)


def test_generation_limits_and_the_workers_needed_are_named() -> None:
    given = config()
    found = probed(given)
    assert found.prediction.bottleneck == "generation"
    assert found.prediction.step_s == pytest.approx(2.01)  # with the pause of the update
    assert found.samples_per_s == pytest.approx(64 / 2.01)
    assert found.workers == 2
    assert found.learner_share == pytest.approx(1 / 3)
    assert found.synchronous_s == pytest.approx(3.0 + 0.01 + 1.0 + 0.04)
    assert verdict(given, found).startswith("Bottleneck: generation")
    assert "rollout.workers=2" in verdict(given, found)


def test_who_has_room_pays_for_scoring_on_its_core() -> None:
    """2 s of generation (0.98 of them on a core), or 1 s on each of two workers."""
    given = config()
    found = probed(given, learn_s=2.1, scoring_s=1.0)
    assert found.cores.rows[0].roles[:2] == ["1 rollout worker", "reward service"]
    assert found.prediction.bottleneck == "generation"
    assert found.prediction.step_s == pytest.approx(2.01 + 1.0)
    found = probed(given, learn_s=1.9, scoring_s=1.0)
    assert found.cores.rows[1].roles[:2] == ["learner", "reward service"]
    assert found.prediction.bottleneck == "learner"
    assert found.prediction.step_s == pytest.approx(1.9 + 1.0)
    given = config(rollout={"workers": 2})
    found = probed(given, cores=3, learn_s=4.0, scoring_s=0.5)
    assert found.prediction.bottleneck == "learner"
    assert found.prediction.step_s == pytest.approx(4.0)  # the workers have room
    assert found.workers == 1
    assert "1 worker(s) would be enough" in verdict(given, found)
    apart = probed(given, cores=8, learn_s=4.0, scoring_s=0.5)
    assert apart.prediction.step_s == pytest.approx(4.0)


def test_a_bound_too_small_is_named_with_the_one_needed() -> None:
    given = config(rollout={"max_running": 256}, staleness={"bound": 1})
    found = probed(given, rate=3200.0, sample_s=4.0)
    assert found.prediction.bottleneck == "staleness"
    assert found.prediction.step_s == pytest.approx((4.0 + 0.01 + 1.0 + 0.04) / 1.5)
    # Only 2 * 64 samples are admitted at bound 1, so no more than these are ever decoded at once.
    assert task_slots(given) == 128
    assert found.bound == 3
    assert "staleness.bound=3" in verdict(given, found)


def test_cores_that_all_roles_share_limit_them_together() -> None:
    given = config(rollout={"workers": 2})
    found = probed(given, cores=2, learn_s=1.2)
    assert found.prediction.bottleneck == "cores"
    assert found.prediction.step_s == pytest.approx((2.0 + 1.2 + 0.02) / 2)


def test_slow_rewards_are_named() -> None:
    given = config()
    found = probed(given, cores=8, scoring_s=9.0)
    assert found.prediction.bottleneck == "scoring"
    assert "reward service" in verdict(given, found)


def test_the_table_shows_what_was_measured_and_predicted() -> None:
    given = config()
    text = "\n".join(table(given, probed(given)))
    for part in (
        "1600 tokens/s a worker",
        "step at bound 2",
        "31.8 samples/s",
        "needed: 2 (set: 2)",
    ):
        assert part in text


def test_a_machine_that_was_busy_is_mentioned() -> None:
    given = config()
    assert "busy: a role got 40% of a core" in "\n".join(table(given, probed(given, cpu_share=0.4)))
    assert "the machine was busy" not in "\n".join(table(given, probed(given)))


HALF_B = ModelFacts(
    parameters=500_000_000, layers=24, hidden=896, kv_heads=2, head_size=64, vocabulary=151_936,
    context=32_768,
)  # fmt: skip


def test_what_follows_from_a_config_needs_no_model() -> None:
    numbers = derived(config(), None)
    assert numbers["completions per step"] == 64
    assert numbers["groups in flight, at most"] == 48
    assert numbers["asynchronous scheduling of vLLM"].startswith("off: ")
    assert not any("about" in name for name in numbers)


def test_weights_that_do_not_fit_are_shown_beside_what_there_is() -> None:
    small = Machine(cores=2, memory_mb=4096, shared_memory_mb=2048)
    shown = sizes(config(), HALF_B, small)
    learner, worker = list(shown.values())[1:]
    assert learner == "7629 MiB (this machine has 4096 MiB: NOT ENOUGH)"
    assert worker == "3815 MiB (this machine has 4096 MiB)"
    gpu = Machine(
        cores=16, memory_mb=131_072, shared_memory_mb=65_536, gpus=1, gpu_memory_mb=81_559
    )
    on_gpu = sizes(config(learner={"gpus": 0.5}), HALF_B, gpu)
    assert list(on_gpu.values())[1] == "7629 MiB (a GPU has 81559 MiB)"


def test_what_evaluating_the_policy_costs() -> None:
    section = {"every": 5, "prompts": "h.jsonl", "max_prompts": 100, "samples": 2}
    given = config(evaluation=section)
    (line,) = (row for row in table(given, probed(given)) if "an evaluation" in row)
    assert "6.250" in line  # 200 completions of 50 tokens at 1600 tokens per second
    assert "every 5 steps" in line
    told = evaluation_share(given)["completions per evaluation, at most"]
    assert told.startswith("200, 62.5% of those for training")
    assert evaluation_share(config()) == {}
