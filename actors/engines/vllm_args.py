"""The arguments that vLLM's engine is built with."""

from __future__ import annotations

import os
from typing import Any

import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from actors.engines.vllm_adapters import AdapterStage, adapter_args
from actors.engines.vllm_limits import limit_args
from actors.engines.vllm_parts import PartStage
from actors.engines.vllm_quantization import quantization_args
from actors.engines.vllm_weights import WeightStage
from actors.settings import EngineSettings
from cluster.contracts.devices import EAGER_ENGINE, IN_FLIGHT_STEPS

TESTED_VLLM = "0.32.0"  # `vllm_multistep` reaches into parts that change between releases


def _platform_args(settings: EngineSettings) -> dict[str, Any]:
    """Engine arguments that differ between CPU and CUDA."""
    if current_platform.is_cpu():
        if settings.tensor_parallel > 1:
            # Its processes would take cores of their own, wherever this one was put.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # threads run here
        return {
            "enforce_eager": EAGER_ENGINE.cpu,
            "kv_cache_memory_bytes": settings.kv_cache_mb << 20,
            "tensor_parallel_size": settings.tensor_parallel,
        }
    if settings.limits_tokens:
        # vLLM's newer runner refuses `LimitsProcessor`: it has an interface of its own.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return {
        "enforce_eager": EAGER_ENGINE.cuda,
        "gpu_memory_utilization": settings.gpu_memory_fraction,
        # Beside others vLLM cannot measure what is left: it fails where one frees memory meanwhile.
        "kv_cache_memory_bytes": settings.kv_cache_mb << 20 if settings.shares_gpu else None,
        "tensor_parallel_size": settings.tensor_parallel,
    }


def multistep_args(settings: EngineSettings) -> dict[str, Any]:
    """Engine arguments that put `actors.engines.vllm_multistep` in place, where it can be."""
    if why_single_steps(settings):
        return {}
    module = "actors.engines.vllm_multistep"
    return {
        "worker_cls": f"{module}.DecodeWorker",
        "scheduler_cls": f"{module}.MultiStepScheduler",
    }


def why_single_steps(settings: EngineSettings) -> str:
    """Why vLLM's own loop is used for an engine of these settings; nothing where it is not."""
    reasons = {
        f"vLLM {vllm.__version__} is not {TESTED_VLLM}": vllm.__version__ != TESTED_VLLM,
        "it runs on a GPU": not current_platform.is_cpu(),
        "it is divided": settings.tensor_parallel > 1,
        "it serves adapters": settings.adapters is not None,
        "it is quantized": settings.quantization != "none",
        "decode_steps is 0": settings.decode_steps == 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _for_workers(*parts: dict[str, Any]) -> dict[str, Any]:
    """Arguments of several parts, each of which may pass settings on to vLLM's workers."""
    passed_on = {key: v for part in parts for key, v in part.get("additional_config", {}).items()}
    arguments = {key: v for part in parts for key, v in part.items()}
    return arguments | {"additional_config": passed_on}


def engine_args(settings: EngineSettings) -> EngineArgs:
    extension = WeightStage if settings.adapters is None else AdapterStage
    if settings.tensor_parallel > 1:
        extension = PartStage
    return EngineArgs(
        model=settings.model_path,
        revision=settings.revision,
        load_format="auto" if settings.weights == "disk" else "dummy",
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        seed=settings.seed,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_running + 1,  # one seat is kept for the canary
        block_size=settings.block_size,
        enable_prefix_caching=True,
        # Token ids in, token ids out; without a tokenizer vLLM would ignore stop strings.
        skip_tokenizer_init=not settings.stop,
        generation_config="vllm",  # no sampling defaults out of the model's directory
        logprobs_mode="processed_logprobs",  # of what is sampled from: after temperature
        async_scheduling=IN_FLIGHT_STEPS.on(not current_platform.is_cpu()),
        disable_log_stats=True,
        worker_extension_cls=f"{extension.__module__}.{extension.__name__}",
        **multistep_args(settings),
        **_for_workers(limit_args(settings), quantization_args(settings)),
        **adapter_args(settings.adapters),
        **_platform_args(settings),
    )
