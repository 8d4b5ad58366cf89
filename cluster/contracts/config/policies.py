"""Several policies in one run: LoRA adapters on one base, each with its prompts and its rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from cluster.contracts.config.algorithm import BatchConfig
from cluster.contracts.config.base import Section
from cluster.contracts.config.learner import LearnerConfig
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.rollout import RolloutConfig

POLICIES = "policies"
"""Folder of a checkpoint of several policies: ``NAME/adapter``, and the rest of each state."""

PolicyName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
"""Part of folder names, of metrics and of tensor names."""


class PolicyConfig(Section):
    """One adapter. What `[lora]`, `[algorithm]` and `[learner]` say holds for each of them."""

    name: PolicyName = Field(
        description="Lower-case letters, digits, `-` and `_`. The adapter is written to "
        "`adapters/NAME/`; `policies` of a reward names it."
    )
    prompts: str = Field(description="File of this policy's prompts, read as `data.prompts` is.")
    share: int = Field(
        1,
        ge=1,
        description="Parts of each learner step's groups that are of this policy. With shares 1 "
        "and 2, a third and two thirds.",
    )


Policies = list[PolicyConfig]


def turns(policies: Sequence[PolicyConfig]) -> list[int]:
    """Whose turn it is, over and over: places in `policies`, spread as evenly as shares allow."""
    total = sum(policy.share for policy in policies)
    taken = [0] * len(policies)
    order = []
    for turn in range(1, total + 1):
        # The one that is furthest behind its share of the turns so far.
        behind = [
            policy.share * turn - total * n for policy, n in zip(policies, taken, strict=True)
        ]
        place = behind.index(max(behind))
        taken[place] += 1
        order.append(place)
    return order


def with_prompts_of_policies(tree: Any) -> Any:
    """A config that leaves `data.prompts` out gets the policies' files there, for its record."""
    policies = tree.get("policies") if isinstance(tree, dict) else None
    data = tree.get("data", {}) if policies else None
    if not isinstance(policies, list) or not isinstance(data, dict):
        return tree  # what is wrong with it is said later
    files = [p.get("prompts") if isinstance(p, dict) else p.prompts for p in policies]
    named = ", ".join(dict.fromkeys(str(file) for file in files))
    if data.get("prompts", named) != named:
        raise ValueError("data.prompts is not used where [[policies]] name their own: leave it out")
    return {**tree, "data": {**data, "prompts": named}}


def policy_problems(
    policies: Sequence[PolicyConfig],
    lora: LoraConfig | None,
    batch: BatchConfig,
    rollout: RolloutConfig,
    learner: LearnerConfig,
    reward: RewardConfig,
) -> list[str]:
    """Every problem between `[[policies]]` and the other sections."""
    names = [policy.name for policy in policies]
    found = _reward_problems(names, reward)
    if not policies:
        return found
    if len(set(names)) != len(names):
        found.append(f"[[policies]] have the same name twice ({names}): give each its own")
    if lora is None:
        found.append(
            "[[policies]] are LoRA adapters on one base: add a [lora] section (rank = 16, say)"
        )
    elif lora.base != "full":
        found.append(
            "lora.base in 8 or 4 bits cannot be had together with [[policies]]: engines serve "
            "several adapters on the base as it is on the disk. Set lora.base = 'full'"
        )
    total = sum(policy.share for policy in policies)
    if batch.prompts_per_step % total:
        found.append(
            f"batch.prompts_per_step = {batch.prompts_per_step} cannot be divided by the shares of "
            f"[[policies]], which add up to {total}: set it to a multiple of {total}"
        )
    smallest = min(policy.share for policy in policies) * batch.prompts_per_step // total
    if learner.minibatches > smallest * batch.samples_per_prompt:
        found.append(
            f"learner.minibatches = {learner.minibatches} is over the "
            f"{smallest * batch.samples_per_prompt} completions of a policy in a step"
        )
    if rollout.engine == "transformers":
        found.append(
            "rollout.engine = 'transformers' serves one policy: with [[policies]] set it to 'vllm'"
        )
    if rollout.tensor_parallel > 1:
        found.append(
            "rollout.tensor_parallel over 1 cannot be had together with [[policies]]: the proof "
            "that an engine computes with the published adapters needs whole ones"
        )
    if learner.value_model == "own" or learner.value_path is not None:
        found.append(
            "a value network of its own (learner.value_model, learner.value_path) would be a whole "
            "model for each of [[policies]]: leave it out, and each gets a head on the shared trunk"
        )
    return found


def _reward_problems(names: Sequence[str], reward: RewardConfig) -> list[str]:
    found = []
    for source in reward.sources:
        if unknown := [name for name in source.policies if name not in names]:
            there = ", ".join(names) or "none"
            found.append(
                f"the reward {source.name!r} is of the policy {unknown[0]!r}, but [[policies]] "
                f"names {there}"
            )
    if reward.address is not None:
        return found  # its own sources score
    for name in names:
        if all(source.at_least is not None for source in reward.of_policy(name)):
            found.append(
                f"no reward scores the policy {name!r}: add a source with policies = [{name!r}]"
            )
    return found
