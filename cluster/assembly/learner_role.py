"""The learner of a training run, and those that take over from it, made from its config."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

from cluster.assembly.catch_up import steps_since
from cluster.assembly.shipping import RoleFiles
from cluster.assembly.training_record import Training
from cluster.contracts.errors import UserError


def learner_role(training: Training, files: RoleFiles) -> Any:
    """The handle of the learner, and of those that take over from it."""
    from learner.remote.handle import RayLearner
    from learner.settings import LearnerSettings, learner_settings

    resumed, run = training.resumed, training.session.run
    settings = learner_settings(
        training.config,
        canary_prompt=training.prepared.prompts.prompt(0).token_ids,
        run_dir=str(training.session.path.absolute()),
        resume_from=str(resumed.path.absolute()) if resumed else None,
        files=files.learner,
        replay=training.since.files,
    )
    cores = training.cores

    def successor(before: LearnerSettings, step: int) -> LearnerSettings:
        found = None
        with contextlib.suppress(UserError):  # no checkpoint yet: from the start
            found = run.checkpoints.newest_good()
        # What the lost one did beyond, nobody has heard of: it is done again.
        since = steps_since(run, training.config, found.state.step if found else 0, step)
        return replace(
            before,
            resume_from=str(found.path.absolute()) if found else None,
            replay=since.files,
        )

    return RayLearner(
        settings,
        cores=cores.learner,
        threads=cores.learner_threads,
        names=training.session.names,
        room_timeout_s=training.config.cluster.room_timeout_s or math.inf,
        successor=successor,
    )
