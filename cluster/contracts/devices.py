"""Everything that Accord chooses by the kind of device, CPU and CUDA side by side.

Whoever needs one of these imports it from here; `docs/devices.md` is made of this table.
`docs/results.md` says what of the CUDA side has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ByDevice(Generic[T]):
    """What is chosen, for each kind of device, and why."""

    what: str
    cpu: T
    cuda: T
    why: str

    def on(self, device: Any) -> T:
        """device: a torch device, its name, or whether it is a GPU."""
        if isinstance(device, bool):
            return self.cuda if device else self.cpu
        return self.cuda if str(getattr(device, "type", device)).startswith("cuda") else self.cpu


NUMBER_TYPE = ByDevice(
    "`rollout.dtype` and `model.dtype`, where they are not set and nothing was measured",
    "float32",
    "bfloat16",
    "a GPU's matrix units multiply bfloat16, at a multiple of the speed (from compute capability "
    "8.0; older ones get float32); on a CPU Accord measures products of the model's shapes in both "
    "types at the start and takes bfloat16 where it is at least 1.2 times as fast",
)
COMPLETION_TOKENS = ByDevice(
    "`rollout.max_tokens`, where it is not set: at most",
    256,
    1024,
    "a CPU decodes a few hundred tokens a second; on a GPU models are used that explain themselves",
)
DECODED_AT_ONCE = ByDevice(
    "`rollout.max_running`, where it is not set: at most",
    64,
    512,
    "measured on a CPU: no faster with more; on a GPU an estimate, the cache is the real bound",
)
EAGER_ENGINE = ByDevice(
    "vLLM's `enforce_eager`: no compilation, no CUDA graphs",
    True,
    False,
    "on a CPU compiling costs 25 s and gains nothing; on a GPU graphs take the launches of a "
    "decoding step off the host",
)
FIXED_ADDRESSES = ByDevice(
    "a swap copies the staged weights over those in force, instead of exchanging the two",
    False,
    True,
    "CUDA graphs hold the addresses of the weights; a copy within the GPU takes milliseconds",
)
IN_FLIGHT_STEPS = ByDevice(
    "vLLM's `async_scheduling`",
    False,
    False,
    "vLLM labels tokens with the weight version when it handles a step's outputs "
    "(`v1/engine/core.py`, `_attach_weight_version`), not when it computes them: a step in flight "
    "at a swap would carry the version after it",
)
CACHE_BY_SIZE = ByDevice(
    "an engine's cache, where nothing else uses the device: by `rollout.kv_cache_mb`, or by "
    "`rollout.gpu_memory_fraction`",
    "kv_cache_mb",
    "gpu_memory_fraction",
    "a CPU's memory is shared with the other roles; on a GPU of its own vLLM measures what is "
    "left. On a shared GPU it cannot (what another process frees meanwhile ends the engine), so "
    "`kv_cache_mb` holds there, too",
)
ENGINE_CORES = ByDevice(
    "`rollout.cpus`, where it is not set: at most",
    16,
    1,
    "decoding on a CPU waits for memory, which more cores do not make faster; on a GPU the "
    "engine's thread waits for the device",
)
PACKED_ROWS = ByDevice(
    "`learner.packing` = 'auto' packs rows (with plain causal attention)",
    True,
    True,
    "packing saves the work of padding; a GPU needs bfloat16 for it, as flash attention does",
)
ATTENTION = ByDevice(
    "attention of the learner's padded rows",
    "eager",
    "sdpa",
    "on a GPU torch's fused kernels need no matrix of scores; on a CPU eager is as fast for short "
    "rows, and its numbers are the reference",
)
FAST_PRODUCTS = ByDevice(
    "fast float32 products (`torch.set_float32_matmul_precision('medium')`)",
    True,
    False,
    "on a CPU they are still float32 where oneDNN computes them (tried out at the start); on a GPU "
    "they are TF32, with 10 bits",
)
FUSED_OPTIMIZER = ByDevice(
    "fused AdamW", True, True, "one pass over weights and moments; torch has it for both"
)
MICROBATCH_TOKENS = ByDevice(
    "`learner.tokens_per_microbatch`, where it is not set: at most",
    2048,
    8192,
    "on a CPU products are as fast with more; on a GPU launching the kernels of a small microbatch "
    "takes longer than computing it (an H100 and 0.5B parameters: passes 3.3 times as fast with "
    "8192 as with 2048)",
)
LOGITS_AT_ONCE = ByDevice(
    "logits that the learner computes at once",
    1 << 23,
    1 << 27,
    "small enough for a CPU's cache; on a GPU large enough to fill it",
)
KEPT_PROBABILITIES = ByDevice(
    "probabilities held from a forward pass for its backward (2 or 4 bytes each): at most",
    1 << 25,
    1 << 29,
    "of more, backward computes each chunk again: memory against a third product",
)
NUMBERS_HASHED = ByDevice(
    "numbers whose sum proves the loaded weights, at a time",
    1 << 16,
    1 << 24,
    "their 64-bit images stay in a CPU's cache; on a GPU this bounds the extra memory (128 MiB)",
)
NUMBERS_MERGED = ByDevice(
    "numbers of a base into which an adapter is merged, at a time",
    1 << 17,
    1 << 24,
    "the product stays in a CPU's cache; on a GPU this bounds the extra memory (128 MiB)",
)
PROBED_SIDE = ByDevice(
    "side of the matrices whose product measures the peak for `perf/mfu`",
    768,
    8192,
    "large enough for the peak, 50 ms in all",
)
COMMUNICATOR = ByDevice(
    "processes of the learner, and `weights.transport = 'collective'`",
    "gloo",
    "nccl",
    "NCCL moves bytes between GPUs without the host; gloo is what there is without one",
)
PINNED_STAGING = ByDevice(
    "host arrays of an update go to the device through pinned memory, on a stream of their own",
    False,
    True,
    "a copy from pageable memory blocks its stream and the host; on a CPU there is no copy at all",
)


def table() -> list[ByDevice[Any]]:
    """Every choice, in the order of this file."""
    return [value for value in globals().values() if isinstance(value, ByDevice)]


def as_markdown() -> str:
    """The rows of `docs/devices.md`."""
    head = "| what | CPU | CUDA | why |\n|---|---|---|---|\n"
    rows = (f"| {c.what} | {_said(c.cpu)} | {_said(c.cuda)} | {c.why} |" for c in table())
    return head + "\n".join(rows) + "\n"


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1 << 16:
        return f"2^{value.bit_length() - 1}"
    return f"`{value}`" if isinstance(value, str) else str(value)
