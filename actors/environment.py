"""What must be settled in a worker's process before torch or vLLM is imported."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from actors.settings import EngineSettings
from cluster.contracts.errors import UserError
from cluster.contracts.protocols import Engine
from cluster.contracts.telemetry import telemetry_off
from cluster.machine.imports import quick_imports
from cluster.machine.torch_state import set_threads

EngineKind = Literal["auto", "vllm", "transformers"]


def vllm_available() -> bool:
    """Whether vLLM is installed; it is not imported (that takes seconds)."""
    return importlib.util.find_spec("vllm") is not None


def choose_engine(kind: EngineKind) -> tuple[Literal["vllm", "transformers"], str]:
    """The engine to use, and a sentence for the user when it was not the first choice."""
    if kind == "transformers" or (kind == "auto" and not vllm_available()):
        note = "vLLM is not installed here: generating with transformers"
        return "transformers", note if kind == "auto" else ""
    if not vllm_available():
        raise UserError(
            "vLLM is not installed", where="rollout.engine", fix="use rollout.engine = 'auto'"
        )
    return "vllm", ""


def engine_variables(gpu: bool) -> dict[str, str]:
    """What torch and vLLM read when they are imported."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    if gpu:
        # vLLM's attention in float32 is written in Triton, whose products are TF32 (10 bits) by
        # default: 0.02 nats off on an H100.
        variables["TRITON_F32_DEFAULT"] = "ieee"
        # It samples with top-k and top-p of vLLM's own, which Accord never asks for, and it is
        # imported even so.
        variables["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    else:
        # On CPU the compiler buys nothing and its first use takes 10 s and a C++ compiler.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


def prepare_environment(
    cores: Sequence[int] = (), gpu: bool = False, threads: int | None = None
) -> None:
    """Set variables and core affinity; to be called first thing, as OpenMP reads them once.

    ``threads``: of torch on a CPU; None: one for each of ``cores``.

    Raises RuntimeError when torch is already there: the settings would be ignored without a word.
    """
    if "torch" in sys.modules and os.environ.get("OMP_NUM_THREADS") is None:
        raise RuntimeError("torch was imported before prepare_environment()")
    telemetry_off()
    os.environ.update(engine_variables(gpu))
    if not gpu:
        # Two processes spinning in OpenMP on the same cores are many times slower.
        os.environ["OMP_NUM_THREADS"] = str(threads or max(1, len(cores)))
        # It would override kv_cache_mb, in whole GiB, filled with zeros.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(cores))


def make_engine(kind: Literal["vllm", "transformers"], settings: EngineSettings) -> Engine:
    """Import and build an engine, on the calling thread. Takes seconds."""
    engine_class: Callable[[EngineSettings], Engine]
    with quick_imports(scipy=False):
        if kind == "vllm":
            from actors.engines.vllm_engine import VllmEngine

            engine_class = VllmEngine
        else:
            from actors.engines.transformers_engine import TransformersEngine

            engine_class = TransformersEngine
        # Before the engine is built: vLLM collects garbage several times meanwhile, and would look
        # through all modules each time.
        gc.freeze()
        if threads := os.environ.get("OMP_NUM_THREADS"):
            # A process that was forked has imported OpenMP before the variable was set.
            set_threads(int(threads))
        return engine_class(settings)
