"""The learner: one step from scored rollouts to published weights. No Ray here.

Weights of version v are those before step v; step v publishes version v + 1.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import torch

from cluster.contracts.crash_points import passing
from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import Fatal, UserError
from cluster.contracts.metrics import Metric, last, values
from cluster.contracts.records import Canary, StepInput, StepResult, WeightManifest
from cluster.machine.torch_state import prepare_torch
from cluster.weights.transports import Publisher, PublisherOptions, make_publisher
from learner.compute.optimizer import lr_factor, set_lr
from learner.compute.ranks import SINGLE, Ranks
from learner.compute.stored import write_shares
from learner.rl.ahead import WorkAhead
from learner.rl.catch_up import catch_up
from learner.rl.checkpoint import Snapshot, TrainerState
from learner.rl.experience import Experience, StepPlan, build_experience
from learner.rl.flops import matrix_peak, step_flops
from learner.rl.forward import Networks
from learner.rl.metrics import experience_metrics, sequence_kl
from learner.rl.networks import build_kl_controller, build_networks, build_optimizers
from learner.rl.own_rows import trained_tokens
from learner.rl.policies import by_policy, merged, networks_of_policies
from learner.rl.policy_checkpoints import PolicySnapshots, restore, snapshot_of
from learner.rl.publish import buckets, canary, canary_tokens, lora_update
from learner.rl.rollout_files import RolloutWriter
from learner.rl.rollouts import RolloutBatch, as_table, read_batch
from learner.rl.short_memory import in_smaller_parts
from learner.rl.step_clock import StepClock
from learner.rl.step_record import attach, step_record, weights_digest
from learner.rl.update import PolicyUpdate, UpdateResult
from learner.settings import LearnerSettings

log = logging.getLogger("accord.learner")


class PPOLearner:
    """PPO and its relatives (`algorithm.advantage` x `algorithm.loss`) on one device a process.

    publisher: where weights go; None makes the one of `weights.transport`.
    threads: of torch; 0 leaves them as the process was started.
    ranks: the processes that are one learner. Each makes the same calls with the same arguments;
    the first one publishes and writes, the manifests of the others name no tensors.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        publisher: Publisher | None = None,
        threads: int = 0,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.settings = settings
        self._ranks = ranks
        self._threads = threads
        self._publisher = publisher
        self._state: TrainerState | None = None
        self._writer: RolloutWriter | None = None
        self._peak = math.inf  # FLOP/s
        self._ahead = WorkAhead()
        self._digest = ""  # of the weights published last

    def start(self) -> WeightManifest:
        """Load models (or the checkpoint `resume_from`) and publish what training starts from.

        Raises UserError for models or settings that cannot work.
        """
        settings = self.settings
        # Threads and determinism are the process's: they are set before the first kernel runs.
        prepare_torch(self._threads, deterministic=settings.learner.deterministic)
        # Models with code of their own may draw random numbers when they are built or run.
        torch.manual_seed(settings.seed)
        networks, tokenizer = build_networks(settings, self._ranks)
        first, *others = [
            self._state_of(name, of_policy, tokenizer)
            for name, of_policy in networks_of_policies(networks, settings).items()
        ]
        first.others = tuple(others)
        self._state = first
        first.lora = lora_update(networks, settings)
        self._peak = matrix_peak(settings.model.dtype, networks.device) * self._ranks.size
        # After the canary's tokens: a checkpoint brings those of its run's start.
        if settings.resume_from is not None:
            self.restore(settings.resume_from)
        publisher = self._publisher
        if settings.replay:
            catch_up(self, settings.replay)
            prepare_torch(self._threads, deterministic=settings.learner.deterministic)
        self._publisher = publisher
        if self._publisher is None and self._ranks.first:
            self._publisher = _publisher(settings)
        if self._ranks.first and settings.save_rollouts and settings.run_dir is not None:
            self._writer = RolloutWriter(Path(settings.run_dir) / "rollouts")
        return self._publish()

    def work_ahead(self, batch: StepInput) -> None:
        """Compute what can be computed of some groups of the next step, which make up whole parts
        of it (`learner.stream_parts`). Nothing that fails here fails the step."""
        if batch.step != self.state.version or self._ranks.size > 1:
            return
        try:
            self._ahead.work(
                batch,
                list(self.state.each()),
                self.settings,
                value_only=self._value_only(batch.step),
            )
        except Exception:  # whatever it is, the step meets it again, and says so
            log.warning("step %d could not be begun early", batch.step, exc_info=True)
            self._ahead.forget()

    def step(self, batch: StepInput) -> StepResult:
        """Train on the step's groups and publish the next version.

        payloads: Arrow tables (or Arrow stream bytes) of `cluster.contracts.rollout_table`.
        Raises Fatal for a step out of order, rollouts that break a promise (missing, twice, too
        old, not finite) and updates that are not finite three times running.
        """
        clock = StepClock()
        state, settings = self.state, self.settings
        # One step makes one version. A step asked for twice would train twice on the same groups.
        if batch.step != state.version:
            raise Fatal(f"step {batch.step} was asked of a learner at version {state.version}")
        if self._publisher is not None:
            # All that a worker may still ask for. Here, not at the end: on a device the memory let
            # go is what the new version is written to.
            kept = {batch.step} if batch.sending is None else {batch.step, batch.sending}
            self._publisher.retain(kept)
        if self._writer is not None:
            self._writer.flush()
        clock.enters("read")
        # Nothing has been changed before this line: a payload that cannot be read leaves a learner
        # that can be asked for the same step again.
        tables = [as_table(payload) for payload in batch.payloads]
        rollouts = read_batch(tables, batch.group_ids, settings.batch.samples_per_prompt)
        parts = by_policy(
            rollouts,
            [one.policy for one in state.each()],
            settings.batch.samples_per_prompt,
        )
        trained = {
            one.policy: self._train(one, parts[one.policy], batch, clock)
            for one in state.each()
            if one.policy in parts
        }
        metrics = merged({name: done.metrics for name, done in trained.items()})
        for one in state.each():
            one.version += 1
        # The record of a step holds the digests on both sides of it, so that a replay can tell a
        # wrong start from a wrong step.
        before = self._digest
        clock.enters("publish")
        passing("learner.before_publish")
        manifest = self._publish(of_step=True)
        clock.enters("record")
        if self._writer is not None:
            record = step_record(settings, batch, before, manifest)
            # Only after publishing: a step whose weights nobody has got leaves no rollouts file.
            self._writer.write(batch.step, attach(rollouts.table, record))
        # After publishing: what a step costs includes its weights.
        metrics += self._cost(rollouts, batch.step, clock)
        self._ahead.next_step()
        return StepResult(
            step=batch.step,
            version=state.version,
            metrics=tuple(metrics),
            manifest=manifest,
            trained_tokens=sum(done.tokens for done in trained.values()),
            not_written=() if self._writer is None else self._writer.take_not_written(),
            smaller_microbatches=min(
                (done.smaller for done in trained.values() if done.smaller is not None),
                default=None,
            ),
        )

    def _state_of(self, policy: str, networks: Networks, tokenizer: Any) -> TrainerState:
        """Of one policy, as training starts."""
        settings = self.settings
        with networks.own_adapter():
            tokens = canary_tokens(networks.policy_root, settings.canary_prompt)
        return TrainerState(
            networks=networks,
            tokenizer=tokenizer,
            optimizers=build_optimizers(networks, settings.learner),
            kl=build_kl_controller(settings),
            version=0,
            canary_ids=tokens,
            policy=policy,
        )

    def _train(
        self, state: TrainerState, rollouts: RolloutBatch, batch: StepInput, clock: StepClock
    ) -> _Trained:
        """Train one policy on its part of a step."""
        settings = self.settings
        if batch.kl_coef is not None:
            state.kl.coef = batch.kl_coef
        plan = StepPlan(
            step=batch.step, kl_coef=state.kl.coef, value_only=self._value_only(batch.step)
        )

        def train(settings: LearnerSettings) -> tuple[Experience, UpdateResult]:
            clock.enters("experience")
            if settings is not self.settings:
                self._ahead.forget()  # memory ran out
            ahead = self._ahead.of(state.policy)
            experience = build_experience(rollouts, state.networks, settings, plan, ahead)
            return experience, self._update(state, experience, plan, clock)

        with state.networks.own_adapter():
            (experience, update), trained_with = in_smaller_parts(train, settings, state, rollouts)
        clock.enters("metrics")
        passing("learner.after_optimizer_step")
        in_reward = settings.algorithm.kl.place == "reward"
        return _Trained(
            metrics=[
                *update.metrics,
                *experience_metrics(experience, update.proximal, plan.kl_coef, in_reward),
            ],
            tokens=int(trained_tokens(rollouts, settings.algorithm).sum()),
            smaller=None
            if trained_with is settings
            else trained_with.learner.tokens_per_microbatch,
        )

    def _cost(self, rollouts: RolloutBatch, step: int, clock: StepClock) -> list[Metric]:
        """What a step has taken, at its end."""
        networks = self.state.networks
        cpu = self._ranks.total(clock.cpu_s, networks.device)
        work = step_flops(networks, self.settings, rollouts, self._value_only(step))
        ahead = self._ahead
        times = clock.metrics()
        wall = values(times)["time/step"] + ahead.seconds
        return [
            *times,
            last("perf/learner_busy_s", wall),
            last("perf/tokens_per_s", float(rollouts.lengths.sum()) / wall),
            last("perf/learner_cpu_s", cpu + ahead.cpu_s),
            last("perf/mfu", work / (wall * self._peak)),
        ]

    def snapshot(self) -> Snapshot | PolicySnapshots:
        """Copy this rank's share of a checkpoint, so that it can be written while training goes on.
        Rollouts of the steps before are then on disk."""
        if self._writer is not None:
            self._writer.flush()
        return snapshot_of(self.state)

    def save(self, directory: str | Path) -> tuple[FileDigest, ...]:
        """Write policy/ and the trainer's state under `directory`, which all ranks see; complete on
        return. The files, on every rank."""
        root, taken = Path(directory), self.snapshot()
        return write_shares(self._ranks, root, lambda: taken.write(root))

    def restore(self, directory: str | Path) -> None:
        """Take up exactly where `save` stood. Raises UserError where that is not possible."""
        restore(self.state, directory)

    def close(self) -> None:
        """Finish writing rollouts and let go of published weights."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            if self._publisher is not None:
                self._publisher.close()

    @property
    def state(self) -> TrainerState:
        if self._state is None:
            raise Fatal("the learner was used before it was started")
        return self._state

    @property
    def publishes(self) -> bool:
        """Whether this is the rank that knows what was published."""
        return self._ranks.first

    @property
    def digest(self) -> str:
        """Of the weights published last."""
        return self._digest

    def publish_to(self, publisher: Publisher) -> None:
        """Publish the weights of now to another publisher, and those of each step from now on."""
        self._publisher = publisher
        self._publish()

    def _value_only(self, step: int) -> bool:
        return self.state.networks.has_values and step < self.settings.learner.value_warmup_steps

    def _update(
        self, state: TrainerState, experience: Experience, plan: StepPlan, clock: StepClock
    ) -> UpdateResult:
        """Train on the experience, then let the KL coefficient follow."""
        learner = self.settings.learner
        total = self.settings.batch.steps
        factor = lr_factor(learner.schedule, plan.step, total, learner.warmup_steps)
        rate = set_lr(state.optimizers.policy, factor)
        if state.optimizers.value is not None:
            set_lr(state.optimizers.value, factor)
        update = PolicyUpdate(state.networks, state.optimizers, self.settings, clock)
        result = update.train(experience, plan)
        clock.enters("metrics")
        kl = sequence_kl(experience, result.proximal)
        if kl is not None and not plan.value_only:
            # The KL of the batch that was trained, however stale: what the coefficient acted on.
            state.kl.update(kl, len(experience))
        rate_metric = last("policy/lr", 0.0 if plan.value_only else rate)
        return dataclasses.replace(result, metrics=[*result.metrics, rate_metric])

    def _canary(self, state: TrainerState) -> Canary:
        settings, networks = self.settings, state.networks
        tolerance = settings.weights.canary_tolerance
        with networks.own_adapter():
            check = canary(
                networks.policy_root, state.canary_ids, settings.rollout_dtype, tolerance
            )
        return dataclasses.replace(check, adapter=state.policy)

    def _publish(self, of_step: bool = False) -> WeightManifest:
        state, settings, networks = self.state, self.settings, self.state.networks
        dtype, first = settings.rollout_dtype, self._ranks.first
        # With whole weights the first rank has all it needs. Sharded ones have to be gathered, and
        # a rank that left here would leave the others waiting in the gather.
        if not first and not networks.sharded:
            return _nothing(state.version)
        checks = [self._canary(one) for one in state.each()]
        parts = buckets(
            networks.policy,
            # Adapters are sent as they are trained: workers round once, after the merge.
            dtype if settings.lora is None else "float32",
            on_device=self._publisher is not None and self._publisher.on_device,
            limit_bytes=int(settings.weights.bucket_mb * (1 << 20)),
        )
        if not first:
            for _ in parts:  # takes part in gathering them
                pass
            return _nothing(state.version)
        if self._publisher is None:
            raise Fatal("the learner was used before it was started")
        with self._publisher.open(state.version) as update:
            for arrays, dtypes in parts:
                update.add(arrays, dtypes)
                del arrays  # two buckets at a time: the one being sent and the next
                if of_step:  # a learner's start is none
                    passing("learner.mid_publish")
            manifest = dataclasses.replace(
                update.close(checks[0]), lora=self.state.lora, more_canaries=tuple(checks[1:])
            )
        self._digest = weights_digest(manifest)
        return manifest


@dataclasses.dataclass(frozen=True, slots=True)
class _Trained:
    """One policy's part of a step. tokens: trained. smaller: the `learner.tokens_per_microbatch`
    that it took, where memory ran out with that of the config."""

    metrics: list[Metric]
    tokens: int
    smaller: int | None


def _nothing(version: int) -> WeightManifest:
    """What a rank says that publishes nothing."""
    check = Canary(token_ids=(), logprobs=(), tolerance=0.0)
    return WeightManifest(version=version, tensors=(), canary=check, transport="none", locator=None)


def _publisher(settings: LearnerSettings) -> Publisher:
    if settings.weights.transport == "disk" and settings.run_dir is None:
        raise UserError(
            "weights cannot go over a disk without a run directory",
            where="weights.transport",
            fix="set weights.transport = 'object_store', or run.dir",
        )
    return make_publisher(
        settings.weights.transport,
        PublisherOptions(
            directory=str(Path(settings.run_dir or "") / "weights"),
            host=settings.host,
            timeout_s=settings.weights.timeout_s,
        ),
    )
