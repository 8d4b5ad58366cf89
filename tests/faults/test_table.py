"""The twenty faults, each with the fast tests of what docs/fault-model.md promises of it, and those
that meet it for real: vLLM, Ray, processes that are killed, hosts that are cut off."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKERS = "tests/faults/test_workers.py"
BOOKS = "tests/faults/test_books.py::Runs"
CHECKPOINTS = "tests/unit/cluster/runs/test_checkpoints.py"

FAULTS: dict[int, tuple[str, ...]] = {
    1: (f"{WORKERS}::test_01_workers_are_killed_serving_and_idle",),
    2: (
        f"{WORKERS}::test_02_an_engine_dies_and_its_successor_serves_only_with_current_weights",
        "tests/unit/actors/test_rollout.py::test_a_failed_step_surfaces_with_its_cause",
    ),
    3: (f"{WORKERS}::test_03_a_hung_worker_is_replaced_and_what_it_answers_later_is_refused",),
    4: (
        "tests/unit/actors/test_rollout.py"
        "::test_completions_are_kept_through_an_outage_and_scored_once_it_ends",
    ),
    5: ("tests/unit/reward_service/test_wire.py::test_malformed_replies_are_refused_by_name",),
    6: (
        "tests/faults/test_learner.py"
        "::test_06_a_killed_learner_is_replaced_and_each_prompt_is_trained_once",
        "tests/unit/learner/rl/test_learner.py"
        "::test_save_restore_and_one_more_step_equals_no_interruption",
    ),
    7: (
        "tests/unit/learner/compute/test_microbatches_and_step.py"
        "::test_a_step_that_is_not_finite_changes_nothing_and_the_third_is_fatal",
    ),
    8: (f"{BOOKS}.the_command_is_killed_and_the_run_resumed",),
    9: (
        "tests/faults/test_head.py::test_09_the_head_is_lost_and_the_newest_state_is_saved",
        "tests/faults/test_head.py"
        "::test_09_the_head_is_lost_with_the_learner_and_the_newest_checkpoint_stays",
    ),
    10: (
        f"{WORKERS}::test_10_a_node_is_drained_by_its_deadline_and_another_worker_takes_its_place",
        f"{WORKERS}::test_10_a_lost_node_takes_two_workers_at_once_and_is_not_charged",
    ),
    11: (f"{WORKERS}::test_11_the_number_of_workers_changes_one_three_one_none_two",),
    12: (
        "tests/unit/cluster/loop/test_saving.py"
        "::test_a_full_disk_ends_nothing_and_the_next_interval_tries_again",
        f"{CHECKPOINTS}"
        "::test_a_full_disk_is_told_before_anything_is_written_and_old_ones_make_room",
        "tests/unit/learner/rl/test_learner.py::test_a_full_disk_costs_rollouts_and_no_training",
    ),
    13: (
        f"{CHECKPOINTS}"
        "::test_any_byte_flipped_cut_or_emptied_in_any_file_and_the_one_before_is_used",
    ),
    14: (
        "tests/unit/learner/rl/test_replay.py"
        "::test_any_flipped_bit_of_the_rollouts_names_their_file",
    ),
    15: (f"{WORKERS}::test_15_a_weight_update_is_cut_in_every_worker_once",),
    16: (
        f"{WORKERS}"
        "::test_16_a_straggler_slows_nobody_and_its_long_completions_are_trained",
    ),
    17: (
        f"{WORKERS}::test_17_a_poisoned_prompt_is_set_aside_and_the_workers_go_on",
        "tests/unit/actors/test_prompts.py::test_a_bad_row_is_named",
    ),
    18: (
        f"{WORKERS}::test_18_results_that_come_twice_late_or_not_at_all_count_once",
        f"{BOOKS}.deliver_out_of_order_and_twice",
    ),
    19: ("tests/unit/cluster/machine/test_signals.py::test_the_second_signal_ends_it_at_once",),
    20: (
        f"{WORKERS}"
        "::test_20_a_program_that_stood_still_takes_the_answers_that_came_meanwhile",
        f"{WORKERS}::test_20_a_split_network_is_a_worker_that_does_not_answer",
    ),
}  # fmt: skip

LIVE = "tests/integration"
VLLM = f"{LIVE}/test_faults_vllm.py::test_a_run_with_vllm_survives_its_faults"
CRASHES = (
    "tests/integration/test_crash_points.py"
    "::test_a_run_ended_at_every_crash_point_equals_one_that_nobody_disturbed"
)
RECOVERY = f"{LIVE}/test_recovery.py"
SOAK = (
    "tests/cluster/test_soak.py"
    "::test_a_run_survives_random_faults_and_every_prompt_is_accounted_for"
)
HOSTS = (
    "tests/cluster/test_lost_hosts.py::test_a_run_outlives_scaling_a_killed_host_and_a_cut_network"
)
SCALED = "tests/cluster/test_elastic.py::test_a_run_is_scaled_drained_and_loses_a_host"

REAL: dict[int, tuple[str, ...]] = {
    1: (VLLM, SOAK, HOSTS),
    2: (VLLM,),
    3: (VLLM, SOAK),
    4: (
        VLLM,
        f"{LIVE}/test_reward_service.py::test_retries_outlive_a_restart_of_the_server",
        f"{RECOVERY}::test_a_reward_service_is_away_for_long_and_nothing_is_sampled_again",
        f"{LIVE}/test_stall.py::test_a_reward_function_that_sleeps_for_ever",
    ),
    5: (
        f"{LIVE}/test_reward_service.py"
        "::test_a_service_that_answers_nonsense_is_refused_by_name",
    ),
    6: (
        CRASHES,
        f"{RECOVERY}"
        "::test_one_of_two_processes_of_the_learner_is_killed_in_the_middle_of_a_step",
        f"{RECOVERY}::test_the_learner_and_the_reward_service_are_killed_and_started_again",
        f"{LIVE}/test_stall.py::test_a_stopped_learner",
    ),
    8: (
        CRASHES,
        f"{LIVE}/test_crash_points.py"
        "::test_an_asynchronous_run_ended_at_every_crash_point_trains_each_prompt_once_per_epoch",
    ),
    9: (
        f"{LIVE}/test_head_lost.py::test_the_head_is_killed_and_the_run_goes_on_with_a_new_one",
        "tests/cluster/test_head_lost.py"
        "::test_the_host_of_the_head_is_lost_and_the_run_goes_on_with_a_new_one",
    ),
    10: (SCALED, HOSTS),
    11: (VLLM, SCALED, HOSTS),
    12: (f"{LIVE}/test_full_disk.py::test_a_run_goes_on_while_its_disk_is_full",),
    14: (f"{LIVE}/test_replay.py::test_a_flipped_bit_in_one_file_is_named",),
    15: (
        f"{LIVE}/test_swap_torture.py::test_a_bad_update_is_refused_and_the_worker_goes_on",
    ),
    17: (VLLM,),
    18: (f"{LIVE}/test_faults_vllm.py::test_replies_that_ray_loses_count_once",),
    19: (
        VLLM,
        f"{LIVE}/test_interrupt.py::test_training_is_stopped_and_continues_at_the_next_step",
    ),
    20: (SOAK, HOSTS),
}  # fmt: skip


@cache
def names(path: str) -> frozenset[str]:
    """Functions of a test file; those of a class as Class.function."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for outer in tree.body:
        if isinstance(outer, ast.ClassDef):
            found |= {
                f"{outer.name}.{n.name}" for n in outer.body if isinstance(n, ast.FunctionDef)
            }
    return frozenset(found)


@pytest.mark.parametrize("number", range(1, 21))
def test_every_fault_has_a_test_that_exists(number: int) -> None:
    assert FAULTS[number]
    for test in (*FAULTS[number], *REAL.get(number, ())):
        path, _, name = test.partition("::")
        assert name in names(path), test


def cell(tests: tuple[str, ...]) -> str:
    return "<br>".join(f"`{test}`" for test in tests)


def test_the_docs_name_the_same_tests() -> None:
    text = (ROOT / "docs" / "fault-model.md").read_text(encoding="utf-8")
    table = text.split("## The twenty faults", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 21))
    for number, row in enumerate(rows, 1):
        fast, real = row.strip("|").split(" | ")[2:]
        assert (fast, real.strip()) == (cell(FAULTS[number]), cell(REAL.get(number, ())))
