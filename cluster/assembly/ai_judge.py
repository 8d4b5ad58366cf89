"""The AI judge that a config names, for commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from cluster.contracts.config.base import ClusterConfig
from cluster.contracts.config.judge import JudgeConfig
from cluster.contracts.errors import BadReward, Resumable, RewardFailure, UserError
from reward_service.judge.labelling import JudgeIdentity
from reward_service.judge.questions import words_hash
from reward_service.judge.records import Asker, Spent


def by_letter(config: JudgeConfig) -> bool:
    """Whether the judge answers by one letter: a local model has no grammar for more."""
    return config.engine == "vllm"


def identity_of(config: JudgeConfig, criteria: str) -> JudgeIdentity:
    return JudgeIdentity(
        model=config.model,
        place=config.base_url or config.engine,
        prompt_sha256=words_hash(criteria, letter=by_letter(config)),
    )


def make_asker(config: JudgeConfig, cluster: ClusterConfig) -> Asker:
    """Raises UserError for a judge that cannot be used: no key, no cache, no model directory."""
    if config.engine == "vllm":
        from cluster.assembly.local_judge import LocalAsker

        return LocalAsker(config, cluster)
    from reward_service.access import key_from_environment
    from reward_service.judge.asker import EndpointAsker

    return EndpointAsker(config, key_from_environment(config.key_env, "judge.key_env"))


@contextmanager
def asking(asker: Asker, progress: Callable[[], str]) -> Iterator[Asker]:
    """The asker, closed afterwards. A failure says by ``progress`` how far the work had come."""
    with closing(asker):
        try:
            yield asker
        except RewardFailure as problem:
            raise Resumable(
                f"the judge cannot be had: {problem}; {progress()}; to go on, run the same command "
                "again"
            ) from problem
        except BadReward as problem:
            raise BadReward(f"{problem}; {progress()}") from problem
        except UserError as problem:
            raise UserError(
                f"{problem.what}; {progress()}", where=problem.where, fix=problem.fix
            ) from problem


def spent_line(spent: Spent) -> str:
    cost = f", cost {spent.cost:.4f}" if spent.cost else ""
    return (
        f"{spent.requests} requests ({spent.cached} more answers from the cache), "
        f"{spent.prompt_tokens + spent.completion_tokens} tokens{cost}"
    )
