"""Log-probabilities of tokens and entropies of distributions, from logits or from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits at a temperature, in float32 at least: bfloat16 cannot resolve small ratios."""
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


def logprobs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `labels`.

    logits: [..., V]; labels: [...] int64 in [0, V), also at padding. Returns [...] in float32
    or wider.
    Already shifted: logits[..., t, :] must be those that predict labels[..., t].
    """
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(dim=-1)


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), [..., V] to [...]. Logits may be -inf."""
    logp = _scaled(logits, temperature).log_softmax(dim=-1)
    impossible = logp == -torch.inf
    return -(logp.exp() * logp.masked_fill(impossible, 0.0)).sum(dim=-1)


def chunked_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    chunk: int = 1024,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities [N], entropies [N]) of a linear head, never holding [N, V] logits.

    hidden: [N, H]; weight: [V, H]; bias: [V] or None; labels: [N] int64 in [0, V).
    The head is applied to `chunk` rows at a time and again in backward, so memory is chunk * V
    instead of N * V. Computed in float32 at least (also under autocast), where half-precision
    logits would make trainer and engine disagree; results are float32 or wider.
    entropy_gradient: False detaches the entropies, as for a mere metric. No double backward.
    Raises ValueError for a temperature or chunk that is not positive, or shapes that do not fit.
    """
    if temperature <= 0 or chunk <= 0:
        raise ValueError(f"temperature and chunk must be positive, got {temperature}, {chunk}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [N, H] and weight [V, H], got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"need one label per row of {tuple(hidden.shape)}, got {tuple(labels.shape)}"
        )
    logp, entropy = _ChunkedHead.apply(
        hidden, weight, bias, labels, temperature, chunk, entropy_gradient
    )
    return logp, entropy


class _ChunkedHead(torch.autograd.Function):
    """Keeps per-row log-sum-exp and entropy; rebuilds each chunk's logits from them in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk: int,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(weight, bias, temperature)
        logp = hidden.new_empty(hidden.shape[0], dtype=head.dtype)
        normaliser, entropy = torch.empty_like(logp), torch.empty_like(logp)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = head.logits(hidden[rows])
            normaliser[rows] = logits.logsumexp(dim=-1)
            chosen = logits.gather(-1, labels[rows, None]).squeeze(-1)
            logp[rows] = chosen - normaliser[rows]
            entropy[rows] = entropy_from_logits(logits)
        ctx.save_for_backward(hidden, weight, bias, labels, normaliser, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.entropy_gradient = entropy_gradient
        # Saved, so the caller gets a copy: changing the result in place must not reach backward.
        returned = entropy.clone()
        if not entropy_gradient:
            ctx.mark_non_differentiable(returned)
        return logp, returned

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normaliser, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        head = _Head(weight, bias, ctx.temperature)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(head.weight) if need_weight else None
        d_bias = torch.zeros_like(head.weight[:, 0]) if need_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logp = head.logits(hidden[rows]) - normaliser[rows, None]
            d_logits = -logp.exp() * grad_logp[rows, None]
            d_logits.scatter_add_(1, labels[rows, None], grad_logp[rows, None])
            if ctx.entropy_gradient:
                # dH/dz = -p (log p + H); a token of probability 0 contributes 0, not 0 * -inf.
                surprise = logp.masked_fill(logp == -torch.inf, 0.0) + entropy[rows, None]
                d_logits -= logp.exp() * surprise * grad_entropy[rows, None]
            d_logits /= ctx.temperature
            if d_hidden is not None:
                d_hidden[rows] = head.times_weight(d_logits).to(hidden.dtype)
            if d_weight is not None:
                head.accumulate(d_weight, d_logits, hidden[rows])
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 4,
        )


class _Head:
    """The linear head in float32 or wider, with autocast held off."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float) -> None:
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.temperature = temperature

    def _exact(self) -> torch.autocast:
        return torch.autocast(self.weight.device.type, enabled=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] logits of [n, H] hidden states, divided by the temperature."""
        with self._exact():
            logits = torch.nn.functional.linear(hidden.to(self.dtype), self.weight, self.bias)
        return _scaled(logits, self.temperature)

    def times_weight(self, d_logits: Tensor) -> Tensor:
        """[n, H] gradient of the hidden states."""
        with self._exact():
            return d_logits @ self.weight

    def accumulate(self, d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
        """Add this chunk's [V, H] gradient of the weight in place."""
        with self._exact():
            d_weight.addmm_(d_logits.T, hidden.to(self.dtype))
