"""The second set of weights of a vLLM worker: filled beside the one in force, then exchanged.

stage: tensors ─load_weights──▶ a second instance of the model ──pack──▶ ready to compute
swap:  every tensor and packed kernel of the two instances changes places, or, where addresses are
       fixed (CUDA graphs), the staged tensors are copied over those in force on the device

vLLM's own reload works on the model that decodes: it must stop for as long as loading and packing
take. It also packs only layers that received a weight of their own, so that on CPU a head tied to
the embedding goes on with the old one, silently. Here every layer is packed every time.

That what is in force after a swap is what was published is proven by ``vllm_proof``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from actors.engines.amx import ask_for_amx
from actors.engines.proof import NumberSum, differing, number_sum
from actors.engines.token_limits import Drawn, Kept
from actors.engines.vllm_limits import LimitsProcessor
from actors.engines.vllm_proof import LoaderCheck, digests, is_weight, kernels, mark_kernels
from actors.engines.vllm_quantization import stored
from cluster.contracts.devices import FIXED_ADDRESSES
from cluster.contracts.errors import Fatal
from cluster.weights.pinned import PinnedCopies
from cluster.weights.streams import beside

Modules = list[tuple[torch.nn.Module, torch.nn.Module]]

ask_for_amx()  # here, because every process of an engine imports this module before it computes


class Shadow:
    """A twin of ``live`` that has no cache and never computes; it holds one more set of weights.

    ``by_copy``: keep every address of ``live`` (its kernels stay its own and are replaced whole).
    One thread at a time; ``stage`` may run while another thread computes with ``live``.
    """

    def __init__(self, live: torch.nn.Module, config: VllmConfig, by_copy: bool) -> None:
        self._config = config
        self._by_copy = by_copy
        self._twin = _make_twin(config)
        self._pairs = _pair(live, self._twin)
        self._raw = [
            (module, name, parameter, parameter.shape, parameter.dtype)
            for _, module in self._pairs
            for name, parameter in module._parameters.items()
            if parameter is not None and not _is_attention(module)
        ]
        # Attention layers hold no weights of the model: what is there are scales of a cache in 8
        # bits, made with the value that says "none", and removed by vLLM the first time it packs.
        own = {id(parameter) for _, _, parameter, _, _ in self._raw}
        self._loadable = {n for n, p in self._twin.named_parameters() if id(p) in own}
        self._exchange: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._packed_layers = [pair for pair in self._pairs if any(kernels(pair[0]))]
        self._names = {id(module): name for name, module in live.named_modules()}
        self._ready = self._packed = False
        self._staged: dict[str, str] = {}  # digests of what was staged last
        self._loader = LoaderCheck()
        self._pinned = PinnedCopies(torch.device(config.device_config.device))

    @torch.no_grad()
    def stage(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a whole model's tensors as they come, in the names and shapes of its checkpoint, and
        pack them.

        What was staged before and not swapped in is lost, also when this fails.
        Raises Fatal when vLLM's loader left a parameter out or changed its numbers, or a layer was
        not packed.
        """
        self._ready = False
        # Beside the stream that decodes: on it the next step would wait for copies and packing.
        with beside(self._pinned.device):
            self._fill(tensors)
        self._ready = True

    def _fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        published = NumberSum()
        arriving = stored(self._config, self._pinned.on_device(tensors))
        with set_current_vllm_config(self._config):
            self._unpack()
            loaded = self._twin.load_weights(published.of(arriving))
            if loaded is not None:
                left_out = self._loadable - loaded
                if left_out:
                    raise Fatal(f"vLLM's loader passed over {sorted(left_out)[:3]}")
            sums = self._loaded_sums()
            self._loader.compare(published.total, sum(sums.values()) % (1 << 64))
            self._pack()
        if not all(any(kernels(twin)) for _, twin in self._packed_layers):
            raise Fatal("vLLM packed fewer layers than at the start")
        mark_kernels(
            (module, name, sums[id(parameter)]) for module, name, parameter, *_ in self._raw
        )
        self._exchange = list(_tensors(self._pairs))
        self._staged = digests((self._names[id(live)], twin) for live, twin in self._pairs)
        _synchronize()

    @torch.no_grad()
    def swap(self) -> None:
        """Put what is staged in force. Raises Fatal when nothing is."""
        if not self._ready:
            raise Fatal("no weights are staged")
        self._ready = False
        for mine, staged in self._exchange:
            if self._by_copy:
                mine.data.copy_(staged.data)
            else:
                mine.data, staged.data = staged.data, mine.data
        for live, twin in self._packed_layers:
            for (own, name), (other, _) in zip(kernels(live), kernels(twin), strict=True):
                own[name], other[name] = other[name], own[name]
        _synchronize()  # the next stage overwrites what was copied from

    @torch.no_grad()
    def wrong(self) -> list[str]:
        """Names of what the model that decodes holds and was not staged last; empty: all is right.

        Reads what the next forward pass reads; may run while another thread computes.
        """
        found = digests((self._names[id(live)], live) for live, _ in self._pairs)
        return differing(self._staged, found)

    def _loaded_sums(self) -> dict[int, int]:
        """Id of each parameter of the twin -> the sum over its numbers, before it is packed."""
        unique = {id(parameter): parameter for _, _, parameter, _, _ in self._raw}
        return {key: number_sum([parameter]) for key, parameter in unique.items()}

    def _unpack(self) -> None:
        """The twin as its loader expects it: parameters as created, with memory of their own.

        One that packing replaced gets new memory: its old one may have been handed to ``live``.
        """
        for module, name, parameter, shape, dtype in self._raw:
            for holder, kernel in list(kernels(module)):
                del holder[kernel]  # frees the packed weight of two versions ago
            kept = module._parameters.get(name) is parameter
            if not (kept and parameter.shape == shape and parameter.dtype == dtype):
                parameter.data = torch.empty(shape, dtype=dtype, device=parameter.device)
                module._parameters[name] = parameter

    def _pack(self) -> None:
        """What vLLM does after a first load; each layer's raw weights are freed as it is packed."""
        shared = _shared_parameters(self._twin)
        raw: dict[int, list[tuple[str, torch.nn.Parameter]]] = {}
        for module, name, parameter, _, _ in self._raw:
            raw.setdefault(id(module), []).append((name, parameter))
        for _, module in self._pairs:
            method = getattr(module, "quant_method", None)
            scales = _is_attention(module)  # of a cache: vLLM takes them up once
            if isinstance(method, QuantizeMethodBase) and not (scales and self._packed):
                method.process_weights_after_loading(module)
            for name, parameter in raw.get(id(module), ()):
                if module._parameters.get(name) is not parameter and id(parameter) not in shared:
                    parameter.data = parameter.new_empty(0)
        for _, module in self._pairs:
            if _is_attention(module):
                deferred: Any = module
                deferred.process_weights_after_loading(self._config.model_config.dtype)
        if callable(whole := getattr(self._twin, "process_weights_after_loading", None)):
            whole()
        self._packed = True


class WeightStage:
    """What vLLM adds to its worker class, in each process that holds a part of the model."""

    model_runner: Any
    vllm_config: VllmConfig

    def accord_prepare(self) -> None:
        """Build the second set. Nothing may compute meanwhile: it changes global defaults."""
        by_copy = addresses_are_fixed()
        self._accord_shadow = Shadow(self.model_runner.get_model(), self.vllm_config, by_copy)

    def accord_stage(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._accord_shadow.stage(tensors)

    def accord_swap(self) -> None:
        self._accord_shadow.swap()

    def accord_kept(self, request_id: str) -> list[Kept]:
        """Hands out what the sampler noted of a request, and forgets it."""
        for processor in self.model_runner.input_batch.logitsprocs.all:
            if isinstance(processor, LimitsProcessor):
                return processor.kept.pop(request_id, [])
        return []

    def accord_multistep(self) -> tuple[str, dict[str, Drawn]]:
        """Why vLLM's own pass is used, or nothing; and where the runner notes what it samples."""
        reason: str = self.model_runner.prepare_multistep()
        return reason, self.model_runner.drawn

    def accord_wrong(self) -> list[str]:
        return self._accord_shadow.wrong()


def addresses_are_fixed() -> bool:
    """Whether something captured the addresses of the weights, as a CUDA graph does."""
    return FIXED_ADDRESSES.on(not current_platform.is_cpu())


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _make_twin(config: VllmConfig) -> Any:
    """The same model again, uninitialised, not to be compiled and in nobody's cache registry."""
    compilation = copy.copy(config.compilation_config)
    compilation.static_forward_context = {}
    compilation.mode = CompilationMode.NONE
    apart = copy.copy(config)
    apart.compilation_config = compilation
    device = torch.device(config.device_config.device)
    with set_default_torch_dtype(config.model_config.dtype), device:
        return initialize_model(apart).eval()


def _pair(live: torch.nn.Module, twin: torch.nn.Module) -> Modules:
    """Modules of the same name; those vLLM itself shares (rotary tables) are left out."""
    mine, other = dict(live.named_modules()), dict(twin.named_modules())
    names = {name: type(module) for name, module in mine.items()}
    if names != {name: type(module) for name, module in other.items()}:
        raise Fatal("vLLM built another structure for the second set of weights")
    pairs = [(mine[name], other[name]) for name in mine if mine[name] is not other[name]]
    _tie_parameters(pairs)
    return pairs


def _tie_parameters(pairs: Modules) -> None:
    """One parameter in two modules of the twin wherever the live ones share theirs.

    vLLM ties a head again after loading when a checkpoint spells out what its config calls tied.
    """
    partners: dict[int, torch.nn.Parameter | None] = {}
    for live, twin in pairs:
        for name, parameter in live._parameters.items():
            if parameter is not None and parameter.numel() and name in twin._parameters:
                twin._parameters[name] = partners.setdefault(id(parameter), twin._parameters[name])


def _tensors(pairs: Modules) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(in force, staged) of every parameter, buffer and derived tensor, a shared one once."""
    seen: set[int] = set()
    for live, twin in pairs:
        holders: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            (live._parameters, twin._parameters),
            (live._buffers, twin._buffers),
            (vars(live), vars(twin)),
        )
        for mine, staged in holders:
            for name, tensor in mine.items():
                if not is_weight(name, tensor):
                    continue
                if (id(tensor) in seen) != (id(staged[name]) in seen):
                    raise Fatal(f"vLLM shares {name!r} in one set of weights, not in the other")
                if id(tensor) not in seen:
                    seen |= {id(tensor), id(staged[name])}
                    yield tensor, staged[name]


def _is_attention(layer: torch.nn.Module) -> bool:
    """Whether vLLM packs the layer after all others. (Its own name for this question came after
    0.26, the release that runs with torch 2.11.)"""
    return isinstance(layer, AttentionLayerBase | MMEncoderAttention) and callable(
        getattr(layer, "process_weights_after_loading", None)
    )


def _shared_parameters(model: torch.nn.Module) -> set[int]:
    """Ids of the parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
