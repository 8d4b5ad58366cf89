"""Several decode steps for each turn of vLLM's scheduler, on a CPU.

    schedule ──▶ prompts and one token of each ──▶ token ──▶ token ──▶ ... ──▶ update, outputs
                 `DecodeRunner`: no scheduling and no new batch between the tokens

What vLLM does around a forward pass (scheduling, building the batch, outputs) costs as much as the
pass itself when the model is small. Here it happens once for up to `EngineSettings.decode_steps`
tokens of each sequence. A sequence that ends leaves the batch at once, so no token is sampled that
is not delivered. Nobody else acts between these steps: weights, requests and aborts change between
two calls of the scheduler, so a token's version stays exact.

Ids and log-probabilities go into arrays of 4-byte numbers as they are sampled, and from there into
the completion. vLLM is not asked for log-probabilities.

These classes use vLLM's extension points `worker_cls` and `scheduler_cls`, and inside them parts of
vLLM that change between releases. So they are used with the release that they were tested with;
with any other, vLLM's own loop does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput, SamplerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from actors.engines.drawing import draw
from actors.engines.token_limits import Drawn, TokenLimits
from actors.engines.turns import FEW_LEFT, steps_at_once
from actors.engines.vllm_forward import PlainForward, Rows
from actors.engines.vllm_limits import request_of, settings_of
from cluster.contracts.config.rollout import LEAST_TEMPERATURE


class MultiStepScheduler(Scheduler):
    """vLLM's scheduler; it leaves room in the cache for the steps between two of its turns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_lookahead_tokens = settings_of(self.vllm_config).decode_steps - 1

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        # It counted one computed token per request when it scheduled them.
        for row, request_id in enumerate(model_runner_output.req_ids):
            request = self.requests.get(request_id)
            sampled = model_runner_output.sampled_token_ids
            if request is not None and sampled and len(sampled[row]) > 1:
                request.num_computed_tokens += len(sampled[row]) - 1
        return super().update_from_output(scheduler_output, model_runner_output)

    def _update_request_with_output(
        self, request: Any, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        # Only the last token can end the request: the runner stops there.
        if len(new_token_ids) > 1:
            request.append_output_token_ids(new_token_ids[:-1])
        _, stopped = super()._update_request_with_output(request, new_token_ids[-1:], is_stale)
        return new_token_ids, stopped


@dataclass(slots=True)
class _Turn:
    """The sequences of one turn. All but `states` are by row of the batch."""

    states: list[Any]
    lengths: np.ndarray  # int64: tokens that the cache holds after the first pass
    left: np.ndarray  # int64: tokens that the request may still be given
    places: np.ndarray  # int64: tokens that its completion has so far
    stops: np.ndarray  # int64: ids that end a completion


class DecodeRunner(CPUModelRunner):
    """vLLM's model runner with passes of its own (`PlainForward`), several in a turn."""

    def prepare_multistep(self) -> str:
        """To be called once the cache is there; returns why vLLM's own pass is to be used, else
        nothing."""
        self.drawn: dict[str, Drawn] = {}
        self._plain: PlainForward | None = None
        settings = settings_of(self.vllm_config)
        self._most = 1 if settings.stop else settings.decode_steps
        self._token_limits = TokenLimits(settings, self.model_config.get_vocab_size())
        if len(self.kv_cache_config.kv_cache_groups) != 1 or len(self.attn_groups[0]) != 1:
            return "its layers keep caches of different kinds"
        try:
            builder = self.attn_groups[0][0].get_metadata_builder()
            self._plain = PlainForward(self.get_model(), builder)
            self._parameters = _multiplied(self.get_model())
        except (ValueError, AttributeError) as problem:
            return str(problem)
        return ""

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        plain = getattr(self, "_plain", None)
        # The canary asks for its prompt's log-probabilities, which vLLM's own pass computes.
        canary = self.num_prompt_logprobs or any(
            new.sampling_params.prompt_logprobs is not None
            for new in scheduler_output.scheduled_new_reqs
        )
        if plain is None or canary or not scheduler_output.total_num_scheduled_tokens:
            return super().execute_model(scheduler_output, intermediate_tensors)
        self._update_states(scheduler_output)
        return self._take_turn(plain, scheduler_output.num_scheduled_tokens)

    # -- a turn -----------------------------------------------------------------------------------

    def _take_turn(self, plain: PlainForward, scheduled: dict[str, int]) -> ModelRunnerOutput:
        batch = self.input_batch
        count = batch.num_reqs
        new = np.fromiter((scheduled[i] for i in batch.req_ids), np.int64, count)
        turn = self._turn(new)
        plain.bind()
        rows, lasts = self._first_rows(new)
        # A sequence whose prompt is only partly read is given no token yet.
        known = np.fromiter((state.num_tokens for state in turn.states), np.int64, count)
        alive = np.flatnonzero(turn.lengths == known)
        whole = len(rows.ids) == count and len(alive) == count
        logits = plain.logits(rows, None if whole else torch.from_numpy(lasts[alive]))
        most = steps_at_once(len(alive), self._parameters, self._most)
        ids = np.zeros((most, count), np.int32)
        logprobs = np.zeros((most, count), np.float32)
        counts = np.zeros(count, np.int64)
        enough = FEW_LEFT * len(alive)
        for step in range(most):
            if not len(alive):
                break
            tokens, chances = self._drawn(logits, alive, turn.places[alive] + step, turn.states)
            sampled = tokens.numpy()
            ids[step, alive], logprobs[step, alive] = sampled, chances.numpy()
            counts[alive] += 1
            ended = turn.left[alive] <= step + 1
            if len(turn.stops):
                ended |= (sampled[:, None] == turn.stops).any(axis=1)
            if ended.any():
                alive, sampled = alive[~ended], sampled[~ended]
            if step + 1 == most or len(alive) < enough:
                break
            logits = plain.logits(self._next_rows(alive, sampled, turn.lengths[alive] + step))
        return self._close_turn(turn.states, ids, logprobs, counts)

    def _turn(self, new: np.ndarray) -> _Turn:
        batch = self.input_batch
        states = [self.requests[i] for i in batch.req_ids]
        longest = self.max_model_len
        left = [
            min(s.sampling_params.max_tokens - len(s.output_token_ids), longest - s.num_tokens)
            for s in states
        ]
        return _Turn(
            states=states,
            lengths=batch.num_computed_tokens_cpu[: batch.num_reqs] + new,
            left=np.array(left, np.int64),
            places=np.fromiter((len(s.output_token_ids) for s in states), np.int64, len(states)),
            stops=np.array(states[0].sampling_params.stop_token_ids or (), np.int64),
        )

    def _first_rows(self, new: np.ndarray) -> tuple[Rows, np.ndarray]:
        """What vLLM scheduled: parts of prompts, and the last token of sequences; and the place of
        each sequence's last token among these."""
        batch = self.input_batch
        count = batch.num_reqs
        ends = np.cumsum(new)
        starts = np.concatenate(([0], ends))
        of_row = np.repeat(np.arange(count), new)
        offsets = np.arange(ends[-1]) - starts[of_row]
        computed = batch.num_computed_tokens_cpu[:count].astype(np.int64)
        positions = computed[of_row] + offsets
        ids = batch.token_ids_cpu[of_row, positions]
        return self._rows(
            np.arange(count), of_row, ids, positions, starts, computed + new
        ), ends - 1

    def _next_rows(self, alive: np.ndarray, sampled: np.ndarray, positions: np.ndarray) -> Rows:
        """One more token of each sequence that goes on."""
        starts = np.arange(len(alive) + 1)
        return self._rows(alive, alive, sampled, positions, starts, positions + 1)

    def _rows(
        self,
        rows: np.ndarray,
        of_row: np.ndarray,
        ids: np.ndarray,
        positions: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
    ) -> Rows:
        """rows: of the batch, those that take part; of_row: the row of each token."""
        table = self.input_batch.block_table[0]
        blocks, size = table.block_table.np, table.block_size
        slots = blocks[of_row, positions // size].astype(np.int64) * size + positions % size
        return Rows(
            ids=torch.from_numpy(ids.astype(np.int64)),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            starts=torch.from_numpy(starts.astype(np.int32)),
            lengths=torch.from_numpy(lengths.astype(np.int32)),
            blocks=torch.from_numpy(blocks[rows]),
        )

    def _close_turn(
        self, states: list[Any], ids: np.ndarray, logprobs: np.ndarray, counts: np.ndarray
    ) -> ModelRunnerOutput:
        """Enter the tokens where vLLM looks for them, and into `drawn`."""
        batch = self.input_batch
        by_row, chances = np.ascontiguousarray(ids.T), np.ascontiguousarray(logprobs.T)
        sampled: list[list[int]] = []
        for row, (state, count) in enumerate(zip(states, counts.tolist(), strict=True)):
            own = by_row[row, :count]
            sampled.append(own.tolist())
            if not count:
                continue
            start = batch.num_tokens_no_spec[row]
            batch.token_ids_cpu[row, start : start + count] = own
            batch.is_token_ids[row, start : start + count] = True
            batch.num_tokens_no_spec[row] = start + count
            state.output_token_ids.extend(sampled[-1])
            self._note(state, own, chances[row, :count])
        return ModelRunnerOutput(
            req_ids=batch.req_ids.copy(),
            req_id_to_index=batch.req_id_to_index.copy(),
            sampled_token_ids=sampled,
        )

    # -- sampling ---------------------------------------------------------------------------------

    def _drawn(
        self, logits: torch.Tensor, rows: np.ndarray, places: np.ndarray, states: Sequence[Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and log-probabilities of these rows of the batch. places: tokens that their
        completions have so far."""
        batch = self.input_batch
        temperatures = torch.from_numpy(batch.temperature_cpu[rows])
        greedy = temperatures < LEAST_TEMPERATURE  # vLLM has entered 0 there
        temperatures[greedy] = 1.0
        if (temperatures != 1.0).any():
            logits = logits.div_(temperatures[:, None])
        if self._token_limits.any:
            self._limit(logits, rows, places, states)
        own = batch.generators
        seeded = {i: own[row] for i, row in enumerate(rows.tolist()) if row in own} if own else None
        return draw(logits, seeded, greedy if greedy.any() else None)

    def _limit(
        self, logits: torch.Tensor, rows: np.ndarray, places: np.ndarray, states: Sequence[Any]
    ) -> None:
        names = [request_of(states[row].sampling_params) for row in rows.tolist()]
        marked = [place for place, name in enumerate(names) if name is not None]
        if len(marked) == len(names):
            kept = self._token_limits.apply(logits, places.tolist())
        else:
            chosen = torch.tensor(marked, dtype=torch.int64)
            limited = logits[chosen]
            kept = self._token_limits.apply(limited, places[marked].tolist())
            logits[chosen] = limited
        for place, ids in zip(marked, kept or (), strict=kept is not None):
            known = self._record(str(names[place])).kept
            # vLLM's own pass samples for rows that are still reading their prompt as well.
            known[int(places[place]) :] = [ids]

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        """After a pass of vLLM's own, in which a canary took part."""
        if getattr(self, "_plain", None) is None or logits is None:
            return super()._sample(logits, spec_decode_metadata)
        batch = self.input_batch
        states = [self.requests[i] for i in batch.req_ids]
        rows = np.arange(len(states))
        places = np.fromiter((len(s.output_token_ids) for s in states), np.int64, len(states))
        tokens, chances = self._drawn(logits.float(), rows, places, states)
        sampled, made = tokens.numpy().astype(np.int32), chances.numpy()
        for row in np.flatnonzero(~self.discard_request_mask.np[: len(states)]).tolist():
            self._note(states[row], sampled[row : row + 1], made[row : row + 1])
        return SamplerOutput(torch.from_numpy(sampled)[:, None], None)

    def _note(self, state: Any, ids: np.ndarray, logprobs: np.ndarray) -> None:
        name = request_of(state.sampling_params)
        if name is None:
            return
        record = self._record(name)
        record.ids.frombytes(ids.astype(np.int32, copy=False).tobytes())
        record.logprobs.frombytes(logprobs.tobytes())

    def _record(self, name: str) -> Drawn:
        record = self.drawn.get(name)
        if record is None:
            record = self.drawn[name] = Drawn()
        return record


def _multiplied(model: Any) -> int:
    """Numbers that a token is multiplied with. Packing empties the parameters themselves."""
    count = model.lm_head.num_embeddings_per_partition * model.lm_head.embedding_dim
    for module in model.modules():
        inner = getattr(module, "input_size_per_partition", 0)
        count += inner * getattr(module, "output_size_per_partition", 0)
    return int(count)


class DecodeWorker(CPUWorker):
    """vLLM's CPU worker with a `DecodeRunner`."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = DecodeRunner(self.vllm_config, torch.device("cpu"))
