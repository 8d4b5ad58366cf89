"""`accord replay` on a run made without Ray: stopped, resumed with other steps, a group dropped."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.assembly.replay import replay_run
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.durable import digests_below
from cluster.contracts.errors import UserError
from cluster.contracts.records import RunState, StepInput
from cluster.runs.console import Reporter
from cluster.runs.run import Run
from learner.rl.learner import PPOLearner
from learner.rl.step_record import Differs, settings_digest
from learner.settings import learner_settings
from learner.trainer_file import TRAINER, moved_on

STEPS, STOPPED_AT, DROPPED = 5, 3, 9
SILENT = Reporter(quiet=True)


def config_of(model: Path, runs: Path, total: int) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": {"dir": str(runs), "seed": 3},
            "model": {"path": str(model)},
            "data": {"prompts": "prompts.jsonl"},
            "reward": {"sources": [{"type": "rules"}]},
            "batch": {"prompts_per_step": 4, "samples_per_prompt": 2, "steps": total},
            "rollout": {"max_tokens": 8},
            "staleness": {"bound": 3},
            "algorithm": {"kl": {"controller": "adaptive", "coef": 0.1}},
            "learner": {"lr": 1e-2, "minibatches": 2, "schedule": "linear"},
        }
    )


def train(
    run: Run,
    config: TrainConfig,
    world: ModuleType,
    sampler: Any,
    first: int,
    last: int,
    begun: RunState | None = None,
) -> None:
    """Steps [first, last) as the controller drives them, with a checkpoint at the end. ``begun``:
    where they begin, if groups are missing that are not the usual one."""
    before = str(run.checkpoints.path_of(first)) if first else None
    settings = learner_settings(config, (4, 5, 6), str(run.path), resume_from=before)
    learner = PPOLearner(settings, world.KeepingPublisher())
    learner.start()
    for step in range(first, last):
        kept = [g for g in range(4 * step, 4 * step + 4) if g != DROPPED]
        groups = world.make_groups(
            sampler, seed=step, first_group=4 * step, version=max(0, step - 3)
        )
        learner.step(
            StepInput(step=step, group_ids=tuple(kept), payloads=(world.table_of(groups),))
        )
    staging = run.checkpoints.begin(last)
    files = learner.save(staging)
    learner.close()
    dropped = ({"group": DROPPED, "prompt": "p", "cause": "too long"},) if last > 2 else ()
    known = begun or RunState(step=0, version=0, next_group=0, prompts_total=9, dropped=dropped)
    state = replace(known, step=last, version=last, next_group=4 * last)
    run.checkpoints.commit(staging, files, state, keep=2)


@pytest.fixture(scope="module")
def original(world: ModuleType, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    shutil.copytree(tiny, folder / "model")
    sampler = AutoModelForCausalLM.from_pretrained(tiny).eval()
    config = config_of(folder / "model", folder, STOPPED_AT + 1)
    run = Run.create(str(folder), "r", "train", config)
    train(run, config, world, sampler, 0, STOPPED_AT)
    resumed = config_of(folder / "model", folder, STEPS)
    train(run, resumed, world, sampler, STOPPED_AT, STEPS)
    shutil.copytree(run.checkpoints.path_of(STEPS) / "policy", run.path / "policy")
    run.update_manifest(status="finished")
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Run:
    """A copy to be damaged; its config still names the model of the original."""
    shutil.copytree(original / "r", tmp_path / "r")
    return Run(tmp_path / "r")


def rollouts(run: Run, step: int) -> Path:
    return run.path / "rollouts" / f"step-{step:06d}.parquet"


def replay(run: Run, steps: int | None = None) -> None:
    replay_run(str(run.path), True, steps, SILENT)


def change(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(edit(pq.read_table(path)), path)


def with_column(name: str, edit: Callable[[list[Any]], list[Any]]) -> Callable[[Any], Any]:
    def edited(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        column = pa.array(edit(table.column(name).to_pylist()), table.schema.field(place).type)
        return table.set_column(place, table.schema.field(place), column)

    return edited


def test_a_stopped_and_resumed_run_replays_to_the_same_bits(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    replay(run)
    told = capsys.readouterr().out
    assert "r: 5 steps, " in told
    assert "tokens/s" in told
    assert "the weights after every step and the policy equal the run's, bit for bit" in told


def test_the_first_steps_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    replay(run, 2)
    assert "2 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="the newest checkpoint holds 5 steps, 6 were asked for"):
        replay(run, 6)


def test_any_flipped_bit_of_the_rollouts_names_their_file(run: Run) -> None:
    """Every page of every column, one bit each."""
    path = rollouts(run, 0)
    intact = path.read_bytes()
    chunks = [
        pq.ParquetFile(path).metadata.row_group(0).column(i)
        for i in range(pq.ParquetFile(path).metadata.num_columns)
    ]
    for chunk in chunks:
        end = chunk.data_page_offset + chunk.total_compressed_size
        if chunk.has_dictionary_page:
            end = chunk.dictionary_page_offset + chunk.total_compressed_size
        damaged = bytearray(intact)
        damaged[end - 1] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(Differs, match=r"step-000000\.parquet is damaged"):
            replay(run, 2)
    path.write_bytes(intact[:-20])
    with pytest.raises(Differs, match=r"step-000000\.parquet is damaged"):
        replay(run, 2)


@pytest.mark.parametrize(
    ("column", "edit"),
    [
        ("score", lambda rows: [rows[0] + 1e-6, *rows[1:]]),
        ("logprobs", lambda rows: [[rows[0][0] - 1e-3, *rows[0][1:]], *rows[1:]]),
        ("token_ids", lambda rows: [[3, *rows[0][1:]], *rows[1:]]),
    ],
)
def test_a_changed_number_is_found_at_its_step(run: Run, column: str, edit: Any) -> None:
    change(rollouts(run, 1), with_column(column, edit))
    with pytest.raises(Differs, match="step 1 is the first that differs: trained on step-000001"):
        replay(run)
    replay_run(str(run.path), False, None, SILENT)  # without --verify nothing is compared


def test_another_final_policy_is_found(run: Run) -> None:
    path = run.path / "policy" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Differs, match=r"policy: the replay ends with another model\."):
        replay(run)


def test_the_number_of_threads_is_the_run_s(run: Run) -> None:
    def threads_of_the_second_step(table: pa.Table) -> pa.Table:
        known = dict(table.schema.metadata)
        known[b"accord.step"] = known[b"accord.step"].replace(b'"threads": 1', b'"threads": 2')
        return table.replace_schema_metadata(known)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        change(rollouts(run, 1), threads_of_the_second_step)
        replay_run(str(run.path), False, 2, SILENT)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# -- what a user may have got wrong ----------------------------------------------------------------


def test_another_starting_model(original: Path, tmp_path: Path, world: ModuleType) -> None:
    shutil.copytree(original, tmp_path / "all")
    run = Run(tmp_path / "all" / "r")
    config = run.path / "config.toml"
    config.write_text(config.read_text().replace(str(original), str(tmp_path / "all")))
    replay(run, 1)  # the model may lie elsewhere
    world.make_model(tmp_path / "all" / "model", layers=1)
    with pytest.raises(UserError, match="is not the model this run started from"):
        replay(run)


def test_changed_settings(run: Run) -> None:
    config = run.path / "config.toml"
    config.write_text(config.read_text().replace("clip_value = 0.2", "clip_value = 0.3"))
    with pytest.raises(UserError, match="settings are not those step 0 was trained with"):
        replay(run)


def test_missing_rollouts(run: Run) -> None:
    rollouts(run, 3).unlink()
    with pytest.raises(UserError, match="step 3 has no rollouts file"):
        replay(run)
    shutil.rmtree(run.path / "rollouts")
    with pytest.raises(UserError, match=r"saved no rollouts.*\n.*logging.save_rollouts = true"):
        replay(run)


def test_missing_groups(run: Run) -> None:
    change(rollouts(run, 2), lambda table: table.slice(2))
    with pytest.raises(UserError, match=r"holds groups \[10, 11\], step 2 trained on \[8, 10, 11"):
        replay(run)


def test_rollouts_of_an_older_accord(run: Run) -> None:
    change(rollouts(run, 0), lambda table: table.replace_schema_metadata({}))
    with pytest.raises(UserError, match="written by an older Accord"):
        replay(run)


def test_two_files_exchanged(run: Run) -> None:
    shutil.copy(rollouts(run, 1), rollouts(run, 0))
    with pytest.raises(
        Differs, match=r"step 0: .*step-000000.parquet holds the rollouts of step 1"
    ):
        replay(run)


def test_a_run_of_another_command_and_one_without_a_checkpoint(run: Run) -> None:
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(UserError, match="no usable checkpoint"):
        replay(run)
    run.update_manifest(command="sft")
    with pytest.raises(UserError, match="is a run of `accord sft`, not of `accord train`"):
        replay(run)


def test_a_run_recorded_before_a_default_changed_still_has_its_digest(
    world: ModuleType, tiny: Path
) -> None:
    """The settings of a real run of an earlier Accord, written out in full as its config.toml has
    them, and the digest that its rollouts files hold."""
    settings = world.make_settings(
        tiny,
        learner={"lr": 2e-4, "eps": 1e-5, "tokens_per_microbatch": 2048},
        algorithm={
            "advantage": "grpo",
            "aggregate": "seq-mean-token-mean",
            "missing_eos_penalty": 1.0,
            "kl": {"coef": 0.05, "place": "loss", "estimator": "k3+"},
        },
        batch={"prompts_per_step": 16, "samples_per_prompt": 8, "steps": 8},
        max_tokens=64,
        seed=0,
    )
    recorded = "85383a6da813077aaf3738df9842a877f70f27621f7c8b13ce783f87713e0c66"
    assert settings_digest(settings) == recorded
    changed = settings.learner.model_copy(update={"eps": 1e-8})
    assert settings_digest(dataclasses.replace(settings, learner=changed)) != recorded


def test_a_run_that_went_back_replays_to_the_same_bits(
    world: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps, a checkpoint, a third; then back to the checkpoint in place of the fourth."""
    sampler = AutoModelForCausalLM.from_pretrained(tiny).eval()
    config = config_of(tiny, tmp_path, 5)
    run = Run.create(str(tmp_path), "back", "train", config)
    train(run, config, world, sampler, 0, 2)
    train(run, config, world, sampler, 2, 3)
    rows = [{"group": group, "prompt": "p", "cause": "back"} for group in range(12, 16)]
    rollback = {"step": 3, "to": 2, "kl_coef": 0.4}
    state = RunState(
        step=4,
        version=4,
        next_group=16,
        prompts_total=9,
        dropped=({"group": DROPPED, "prompt": "p", "cause": "too long"}, *rows),
        rollbacks=(rollback,),
    )
    source = run.checkpoints.path_of(2)
    staging = run.checkpoints.begin(4)
    shutil.copytree(source, staging, dirs_exist_ok=True)
    for name in ("manifest.json", "run_state.json"):
        (staging / name).unlink()
    moved_on(source / TRAINER, staging / TRAINER, version=4, kl_coef=0.4)
    run.checkpoints.commit(staging, digests_below(staging), state, keep=9)
    train(run, config, world, sampler, 4, 5, state)
    replay_run(str(run.path), True, None, SILENT)
    assert "back: 4 steps" in capsys.readouterr().out
