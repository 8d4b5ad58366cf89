"""Into how many parts a learner step is cut, each of which an idle learner may begin with."""

from __future__ import annotations

from cluster.assembly.auto.choices import Choices
from cluster.contracts.config.train import TrainConfig

MOST_PARTS = 4


def choose_stream_parts(choices: Choices[TrainConfig]) -> None:
    config = choices.config
    learner, batch = config.learner, config.batch
    if learner.processes > 1:
        parts, why = 1, "rows are dealt out to processes when all are there"
    elif config.staleness.bound > 0:
        parts, why = 1, "with staleness.bound above 0 the learner rarely waits for completions"
    else:
        tokens = config.data.max_prompt_tokens + config.rollout.max_tokens
        longest = batch.prompts_per_step * batch.samples_per_prompt * tokens
        full = longest // learner.tokens_per_microbatch
        parts = max(1, min(MOST_PARTS, batch.prompts_per_step // 2, full))
        why = "the learner works on what is there while the rest of its step is generated"
        if parts == 1:
            why = "the step is about one microbatch, or has fewer than four groups"
    choices.settle("learner.stream_parts", parts, why)
