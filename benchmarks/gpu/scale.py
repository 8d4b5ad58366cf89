"""How large everything of the GPU check is: on a GPU, and in the dry run on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen2 model with random weights and tied embeddings."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int

    @property
    def parameters(self) -> int:
        head = self.hidden // self.heads
        attention = 2 * self.hidden * head * (self.heads + self.kv_heads)
        return self.vocabulary * self.hidden + self.layers * (
            attention + 3 * self.hidden * self.intermediate
        )


TINY = Shape(vocabulary=300, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128)
SMALL = Shape(vocabulary=1024, hidden=512, layers=8, heads=8, kv_heads=4, intermediate=1024)
# Those of Qwen2.5 0.5B and 1.5B.
HALF_B = Shape(vocabulary=151936, hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864)
ONE_AND_A_HALF_B = Shape(
    vocabulary=151936, hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """``device``: "cuda" or "cpu". ``engine``: of whole runs; the parts about the engine itself
    always take vLLM."""

    device: str
    engine: str
    checked: Shape
    trained: Mapping[str, Shape]
    swaps: int
    requests: int
    answer_tokens: int
    learner_rows: int
    learner_tokens: int
    run_steps: int
    run_prompts: int
    run_samples: int
    run_tokens: int
    soak_steps: int
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return int(self.device == "cuda")


GPU = Scale(
    device="cuda",
    engine="vllm",
    checked=SMALL,
    trained={"0.5B": HALF_B, "1.5B": ONE_AND_A_HALF_B},
    swaps=20,
    requests=32,
    answer_tokens=200,
    learner_rows=64,
    learner_tokens=1024,
    run_steps=16,
    run_prompts=32,
    run_samples=8,
    run_tokens=512,
    soak_steps=60,
    limits={"mfu": 0.45, "overlap": 1.6, "bytes_per_parameter": 18.5},
)

# Every line of the scripts runs; nothing that is measured means anything.
DRY = Scale(
    device="cpu",
    engine="transformers",
    checked=TINY,
    trained={"tiny": TINY},
    swaps=3,
    requests=4,
    answer_tokens=40,
    learner_rows=8,
    learner_tokens=32,
    run_steps=5,
    run_prompts=2,
    run_samples=2,
    run_tokens=8,
    soak_steps=4,
)
