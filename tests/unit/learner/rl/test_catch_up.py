"""A learner that takes over trains the steps since the checkpoint again, on their rollouts, and
stands where the one before stood, bit for bit. Otherwise it refuses, and says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from cluster.contracts.errors import RolledBack
from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput, WeightManifest
from learner.rl.learner import PPOLearner
from learner.rl.step_record import KEY, weights_digest
from learner.settings import LearnerSettings

STEPS, SAVED_AFTER = 3, 1
LEARNER = {"lr": 1e-2, "minibatches": 2, "schedule": "linear", "deterministic": True}


class World:
    """A learner that has done three steps, and its files."""

    def __init__(self, helpers: ModuleType, tiny: Path, folder: Path) -> None:
        self.helpers, self.tiny, self.folder = helpers, tiny, folder
        self.sampler = AutoModelForCausalLM.from_pretrained(tiny).eval()
        self.checkpoint = folder / "checkpoint"
        self.published: list[WeightManifest] = []
        writing = self.settings(run_dir=str(folder), save_rollouts=True)
        before = PPOLearner(writing, helpers.KeepingPublisher())
        self.published.append(before.start())
        for step in range(STEPS):
            if step == SAVED_AFTER:
                before.save(self.checkpoint)
            self.published.append(before.step(self.batch(step)).manifest)
        self.next = before.step(self.batch(STEPS)).manifest
        before.close()

    def settings(self, **changes: Any) -> LearnerSettings:
        algorithm = {"kl": {"controller": "adaptive", "coef": 0.1}}
        made: LearnerSettings = self.helpers.make_settings(
            self.tiny, algorithm=algorithm, learner=LEARNER, **changes
        )
        return made

    def batch(self, step: int) -> StepInput:
        groups = self.helpers.make_groups(
            self.sampler, seed=step, first_group=4 * step, version=step
        )
        return StepInput(
            step=step,
            group_ids=tuple(range(4 * step, 4 * step + 4)),
            payloads=(self.helpers.table_of(groups),),
        )

    def file(self, step: int) -> str:
        return str(self.folder / "rollouts" / f"step-{step:06d}.parquet")

    def successor(self, *files: str, checkpoint: bool, **changes: Any) -> PPOLearner:
        settings = self.settings(
            resume_from=str(self.checkpoint) if checkpoint else None, replay=files, **changes
        )
        return PPOLearner(settings, self.helpers.KeepingPublisher())


@pytest.fixture(scope="module")
def made(world: ModuleType, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(world, tiny, tmp_path_factory.mktemp("catch_up"))


@pytest.mark.parametrize("checkpoint", [True, False], ids=["from a checkpoint", "from the start"])
def test_it_stands_where_the_one_before_stood_and_goes_on_alike(
    made: World, checkpoint: bool
) -> None:
    first = SAVED_AFTER if checkpoint else 0
    learner = made.successor(*map(made.file, range(first, STEPS)), checkpoint=checkpoint)
    published = learner.start()
    assert published == made.published[STEPS]
    assert learner.step(made.batch(STEPS)).manifest == made.next


def test_the_number_of_steps_that_a_schedule_ends_at_is_for_each_step_the_one_it_had(
    made: World,
) -> None:
    """It may be changed on a resume, which is of no effect on what was done before."""
    files = map(made.file, range(SAVED_AFTER, STEPS))
    learner = made.successor(*files, checkpoint=True, batch={"steps": 60})
    assert learner.start() == made.published[STEPS]
    assert learner.settings.batch.steps == 60


def test_as_far_as_there_are_files(made: World) -> None:
    assert made.successor(made.file(1), checkpoint=True).start() == made.published[2]
    assert made.successor(checkpoint=True).start() == made.published[SAVED_AFTER]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewritten(edit: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(edit(pq.read_table(path)), path)


def without_record(table: pa.Table) -> pa.Table:
    metadata = {k: v for k, v in table.schema.metadata.items() if k != KEY}
    return table.replace_schema_metadata(metadata)


def with_other_scores(table: pa.Table) -> pa.Table:
    place = table.schema.get_field_index("score")
    values = pa.array([-v.as_py() + i for i, v in enumerate(table.column(place))], "float64")
    return table.set_column(
        place, table.schema.field(place), values.cast(table.schema.types[place])
    )


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, r"step-000001\.parquet is damaged: "),
    "gone": (Path.unlink, r"step-000001\.parquet is damaged: "),
    "without its record": (rewritten(without_record), "does not say what was trained on it"),
    "with other scores": (rewritten(with_other_scores), "step 1, trained again, gives other weigh"),
    "without a sample": (rewritten(lambda t: t.slice(1)), "step 1 cannot be trained again: group"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_lead_there_rolls_the_run_back(
    made: World, tmp_path: Path, name: str
) -> None:
    damage, says = BROKEN[name]
    path = Path(shutil.copy(made.file(1), tmp_path))
    damage(path)
    with pytest.raises(RolledBack, match=says):
        made.successor(str(path), made.file(2), checkpoint=True).start()


def test_files_that_do_not_follow_each_other_roll_the_run_back(made: World) -> None:
    with pytest.raises(RolledBack, match="step 2 was not trained from these weights"):
        made.successor(made.file(2), checkpoint=True).start()


def test_a_coefficient_that_a_monitor_has_set_is_set_again(
    world: ModuleType, tiny: Path, tmp_path: Path
) -> None:
    """From rollouts, from the checkpoint after the step, and in one that has no other KL."""
    sampler = AutoModelForCausalLM.from_pretrained(tiny).eval()

    def settings(**changes: Any) -> LearnerSettings:
        algorithm = {"kl": {"coef": 0.0}}
        made: LearnerSettings = world.make_settings(
            tiny, algorithm=algorithm, learner=LEARNER, reference_for_monitors=True, **changes
        )
        return made

    def batch(step: int) -> StepInput:
        groups = world.make_groups(sampler, seed=step, first_group=4 * step, version=step)
        return StepInput(
            step=step,
            group_ids=tuple(range(4 * step, 4 * step + 4)),
            payloads=(world.table_of(groups),),
            kl_coef=0.3 if step == 1 else None,
        )

    writing = settings(run_dir=str(tmp_path), save_rollouts=True)
    before = PPOLearner(writing, world.KeepingPublisher())
    before.start()
    for step in range(2):
        before.step(batch(step))
    before.save(tmp_path / "checkpoint")
    result = before.step(batch(2))
    before.close()
    assert values(result.metrics)["objective/kl_coef"] == 0.3
    files = tuple(str(tmp_path / "rollouts" / f"step-{step:06d}.parquet") for step in range(3))
    for given in (
        {"replay": files},
        {"replay": files[2:], "resume_from": str(tmp_path / "checkpoint")},
    ):
        after = PPOLearner(settings(**given), world.KeepingPublisher())
        assert weights_digest(after.start()) == weights_digest(result.manifest)
        assert after.state.kl.coef == 0.3
