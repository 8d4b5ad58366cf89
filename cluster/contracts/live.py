"""Where a run stands at this moment, made by its driver every two seconds.

The same record is the file ``live.json`` of the run directory, the gauges ``accord_live_*`` in
Ray's metrics, and the page in Ray's dashboard. Ages and rates are of the driver's clock. ``None``
means that nothing is known yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

LIVE = "live.json"
LIVE_EVERY_S = 2.0
"""How often the driver writes it. A driver that lives never leaves the file much older."""

HISTORY_POINTS = 300
"""As many looks at the run are kept: the last ten minutes."""

WorkerStatus = Literal["starting", "serving", "draining", "broken"]
LearnerState = Literal["starting", "training", "waiting", "ahead", "saving"]
Stage = Literal["rollout", "reward", "learner", "weights"]
STAGES: tuple[Stage, ...] = ("rollout", "reward", "learner", "weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One rollout worker. Rates are over the last ten seconds or so."""

    name: str
    status: WorkerStatus
    tokens_per_s: float = 0.0  # generated
    running: int = 0  # sequences that are being decoded
    waiting: int = 0  # sequences in the engine's queue
    groups: int = 0  # prompts it was given and has not handed back
    scoring: int = 0  # of them: generated, waiting for the reward service
    version: int = -1  # of the weights it serves; -1: none that were verified
    busy: float = 0.0  # share of the time in which its engine decoded
    heartbeat_age_s: float | None = None  # since it last answered; None: it is still starting
    silent: bool = False  # it should have answered by now


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerView:
    """``state_s``: how long it has been in ``state``."""

    state: LearnerState
    state_s: float = 0.0
    step: int = 0  # the step it trains or waits for
    busy: float = 0.0  # share of the last minute in which it trained
    heartbeat_age_s: float | None = None  # since its process last answered
    silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardView:
    """Seen from the workers, so the same for a service that runs elsewhere."""

    waiting: int = 0  # groups that are generated and wait for their scores
    seconds_per_group: float | None = None  # from handing a group over to its scores
    failures: int = 0  # groups that could not be scored and are tried again, since the start


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """Groups (all completions of one prompt) on their way to the learner."""

    unplaced: int = 0  # admitted, without a worker
    in_flight: int = 0  # at the workers: generated or scored
    ready: int = 0  # scored, waiting for the rest of their step
    missing: int = 0  # groups that the next step still lacks
    per_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsView:
    published: int = -1  # newest version of the learner; -1: none yet
    held: int = -1  # every serving worker has at least this one
    sending: bool = False
    last_s: float | None = None  # seconds of the last update, from publishing to the last worker


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessView:
    """In learner steps; of the tokens of the last step. ``bound``: the most that is allowed."""

    bound: int = 0
    mean: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What the run waited for. ``shares``: of the last minute, by stage; they add up to one.

    ``stage`` has the largest share; None while nothing has been measured.
    """

    stage: Stage | None = None
    shares: Mapping[str, float]
    why: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True)
class History:
    """The last minutes, oldest first; one point each ``LIVE_EVERY_S`` or so."""

    time: tuple[float, ...] = ()  # seconds since 1970
    tokens_per_s: tuple[float, ...] = ()
    learner_busy: tuple[float, ...] = ()
    staleness: tuple[float | None, ...] = ()
    ready: tuple[int, ...] = ()
    serving: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveView:
    run: str
    time: float  # seconds since 1970, when it was made
    step: int  # learner steps finished
    steps: int  # of the run
    elapsed_s: float  # of training, resumes included
    tokens_per_s: float = 0.0  # generated, all workers
    trained_tokens_per_s: float | None = None  # of the last step
    reward: float | None = None  # mean score of the last step
    workers: tuple[WorkerView, ...] = ()
    workers_by_status: Mapping[str, int]  # starting, serving, draining; restarted and left so far
    learner: LearnerView
    rewards: RewardView
    queue: QueueView
    weights: WeightsView
    staleness: StalenessView
    bottleneck: Bottleneck
    history: History = History()
    addresses: Mapping[str, str]  # "dashboard", "page" (with its token), ...

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)


def read_live(run_path: Path) -> LiveView | None:
    """What the driver wrote last; None where there is nothing that can be read."""
    try:
        tree = json.loads((run_path / LIVE).read_text(encoding="utf-8"))
        return LiveView(
            **{
                **_known(LiveView, tree),
                "workers": tuple(WorkerView(**_known(WorkerView, w)) for w in tree["workers"]),
                "learner": LearnerView(**_known(LearnerView, tree["learner"])),
                "rewards": RewardView(**_known(RewardView, tree["rewards"])),
                "queue": QueueView(**_known(QueueView, tree["queue"])),
                "weights": WeightsView(**_known(WeightsView, tree["weights"])),
                "staleness": StalenessView(**_known(StalenessView, tree["staleness"])),
                "bottleneck": Bottleneck(**_known(Bottleneck, tree["bottleneck"])),
                "history": History(
                    **{k: tuple(v) for k, v in _known(History, tree["history"]).items()}
                ),
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _known(kind: type, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Of another release's file: what this one knows."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in tree.items() if name in names}
