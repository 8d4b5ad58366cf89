"""Log-probabilities of tokens and entropies of distributions, from logits or from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.algorithms.token_sets import TokenSets


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabularyPart:
    """The rows of a head that this process has, of several that have a part of the vocabulary each.

    start: token id of the first. add, largest: replace a tensor by the sum, or by the element-wise
    maximum, over these processes; each has to call them in the same order.
    """

    start: int
    add: Callable[[Tensor], None]
    largest: Callable[[Tensor], None]

    def columns(self, labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(bool [n], this process has the label; int64 [n], its column, any other's 0)"""
        columns = labels - self.start
        own = (columns >= 0) & (columns < width)
        return own, columns.where(own, 0)


def chunked_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    chunk: int = 1024,
    entropy_gradient: bool = False,
    *,
    entropy: bool = True,
    keep: bool = False,
    reduced: bool = False,
    sets: TokenSets | None = None,
    part: VocabularyPart | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities [N], entropies [N]) of a linear head, never holding [N, V] logits.

    hidden: [N, H]; weight: [V, H]; bias: [V] or None; labels: [N] int64 in [0, V).
    The head is applied to `chunk` rows at a time and again in backward, so memory is chunk * V
    instead of N * V. Computed in float32 at least (also under autocast), where half-precision
    logits would make trainer and engine disagree; results are float32 or wider.
    entropy_gradient: False detaches the entropies, as for a mere metric. No double backward.
    entropy: False leaves them 0, which spares a pass over the probabilities.
    keep: hold the [N, V] probabilities for backward after all, which spares it the head.
    reduced: products as mixed precision has them: those of backward take bfloat16 operands, and on
        a GPU so does the forward one. They are summed up in float32, and logits stay float32.
    sets: normalise each row over the tokens it was sampled from, instead of the whole vocabulary.
    part: weight and bias are those of a part of the vocabulary; the results, and the gradient of
        `hidden`, are those of the whole, the same on every process that has a part.
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
    how = _How(
        temperature=temperature,
        chunk=chunk,
        entropy=entropy or entropy_gradient,
        entropy_gradient=entropy_gradient,
        # Inside a Function's forward nothing records, whoever called it.
        keep=keep and torch.is_grad_enabled(),
        reduced=reduced,
        sets=sets,
        part=part,
    )
    logp, spread = _ChunkedHead.apply(hidden, weight, bias, labels, how)
    return logp, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """The arguments of `chunked_linear_logprobs` that get no gradient, but the labels."""

    temperature: float
    chunk: int
    entropy: bool
    entropy_gradient: bool
    keep: bool
    reduced: bool
    sets: TokenSets | None
    part: VocabularyPart | None

    def chunks(self, rows: int) -> list[slice]:
        return [slice(start, start + self.chunk) for start in range(0, rows, self.chunk)]


class _ChunkedHead(torch.autograd.Function):
    """Keeps the probabilities, or rebuilds each chunk's in backward.

    log_softmax and softmax are one fused pass each; logsumexp is three with temporaries.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        head = _Head(weight, bias, how)
        logp = hidden.new_empty(hidden.shape[0], dtype=head.dtype)
        entropy = torch.zeros_like(logp)
        total = torch.zeros_like(logp)
        kept = []
        for rows in how.chunks(hidden.shape[0]):
            if how.part is not None:
                chances = _chunk_of_part(head, how, (hidden, labels, rows), logp, entropy, total)
                kept += [chances] if how.keep else []
                continue
            every = head.logits(hidden, rows).log_softmax(dim=-1)
            logp[rows] = every.gather(-1, labels[rows, None]).squeeze(-1)
            if not (how.entropy or how.keep):
                continue
            chances = every.exp()
            if how.entropy:
                if bias is not None or how.sets is not None:  # forbidden: 0 * -inf is no number
                    every.masked_fill_(every == -torch.inf, 0.0)
                entropy[rows] = every.mul_(chances).sum(dim=-1).neg_()
            if how.keep:
                # For the gradient of an entropy their logarithm is taken again: not from bfloat16.
                short = how.reduced and not how.entropy_gradient and head.dtype == torch.float32
                kept.append(chances.bfloat16() if short else chances)
        ctx.save_for_backward(hidden, weight, bias, labels, logp, entropy, total, *kept)
        ctx.how = how
        # Saved, so the caller gets copies: changing a result in place must not reach backward.
        returned = entropy.clone()
        if not how.entropy_gradient:
            ctx.mark_non_differentiable(returned)
        return logp.clone(), returned

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, logp, entropy, total, *kept = ctx.saved_tensors
        how: _How = ctx.how
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        head = _Head(weight, bias, how)
        # Of a part of the vocabulary it is a summand, which is not to be rounded.
        kind = hidden.dtype if how.part is None else head.dtype
        d_hidden = torch.empty_like(hidden, dtype=kind) if need_hidden else None
        d_weight = torch.zeros_like(head.weight) if need_weight else None
        d_bias = torch.zeros_like(head.weight[:, 0]) if need_bias else None
        for index, rows in enumerate(how.chunks(hidden.shape[0])):
            if kept:
                chances = kept[index]
            elif how.part is None:
                chances = head.logits(hidden, rows).softmax(dim=-1)
            else:
                chances = head.logits(hidden, rows).sub_(total[rows, None]).exp_()
            up = (grad_logp[rows] / how.temperature)[:, None]
            d_logits = chances * -up.to(chances.dtype)
            # 1 - p without its cancellation, also where p was kept in fewer bits.
            own = -torch.expm1(logp[rows])[:, None] * up
            head.put(d_logits, labels[rows], own.to(d_logits.dtype))
            if how.entropy_gradient:
                # dH/dz = -p (log p + H); a token of probability 0 contributes 0, not 0 * -inf.
                surprise = chances.log().masked_fill_(chances == 0, 0.0) + entropy[rows, None]
                up = (grad_entropy[rows] / how.temperature)[:, None]
                d_logits -= surprise.mul_(chances) * up
            if d_hidden is not None:
                d_hidden[rows] = head.times_weight(d_logits).to(kind)
            if d_weight is not None:
                head.accumulate(d_weight, d_logits, hidden[rows])
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0, dtype=d_bias.dtype)
        if d_hidden is not None and how.part is not None:
            how.part.add(d_hidden)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _chunk_of_part(
    head: _Head,
    how: _How,
    given: tuple[Tensor, Tensor, slice],
    logp: Tensor,
    entropy: Tensor,
    total: Tensor,
) -> Tensor:
    """Fill in one chunk of log-probabilities, entropies and logarithms of the sum of exponentials,
    from a part of the vocabulary; [n, V of the part] probabilities.

    given: hidden [N, H], labels [N], and which rows. log softmax z = z - m - log sum exp(z - m), m
    the largest; the entropy is log s - sum(exp(z - m) (z - m)) / s, s the sum.
    """
    hidden, labels, rows = given
    part = how.part
    assert part is not None
    z = head.logits(hidden, rows)
    largest = z.amax(dim=-1)
    part.largest(largest)
    z.sub_(largest[:, None])
    own, columns = part.columns(labels[rows], z.shape[1])
    chosen = z.gather(-1, columns[:, None]).squeeze(-1).where(own, 0.0)
    chances = z.exp()
    sums = torch.stack((chances.sum(dim=-1), chosen, torch.zeros_like(chosen)))
    if how.entropy:
        z.masked_fill_(z == -torch.inf, 0.0)  # forbidden: 0 * -inf is no number
        sums[2] = z.mul_(chances).sum(dim=-1)
    part.add(sums)
    logarithm = sums[0].log()
    logp[rows] = sums[1] - logarithm
    total[rows] = largest + logarithm
    if how.entropy:
        entropy[rows] = logarithm - sums[2] / sums[0]
    return chances.div_(sums[0, :, None])


class _Head:
    """The linear head in float32 or wider, with autocast held off; see `reduced` above."""

    def __init__(self, weight: Tensor, bias: Tensor | None, how: _How) -> None:
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.temperature = how.temperature
        self._sets, self._part = how.sets, how.part
        self._reduced = how.reduced and self.dtype == torch.float32
        # torch multiplies bfloat16 into float32 on CUDA only.
        self._wide_results = weight.device.type == "cuda"
        self._short: Tensor | None = None

    def _exact(self) -> torch.autocast:
        return torch.autocast(self.weight.device.type, enabled=False)

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        """[n, V] logits of the n rows of [N, H] hidden states, divided by the temperature; -inf
        where a token could not be sampled. Fresh memory."""
        hidden = hidden[rows]
        with self._exact():
            if self._reduced and self._wide_results:
                logits = self._times(hidden.bfloat16(), self._short_weight().T)
                logits = logits if self.bias is None else logits.add_(self.bias)
            else:
                logits = torch.nn.functional.linear(hidden.to(self.dtype), self.weight, self.bias)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        if self._sets is None:
            return logits
        return self._sets.forbid(logits, rows, 0 if self._part is None else self._part.start)

    def put(self, d_logits: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """Write [n, 1] numbers at the labels of [n, V] gradients."""
        if self._part is None:
            d_logits.scatter_(1, labels[:, None], numbers)
            return
        own, columns = self._part.columns(labels, d_logits.shape[1])
        there = d_logits.gather(1, columns[:, None])
        d_logits.scatter_(1, columns[:, None], numbers.where(own[:, None], there))

    def times_weight(self, d_logits: Tensor) -> Tensor:
        """[n, H] gradient of the hidden states."""
        with self._exact():
            if not self._reduced:
                return d_logits @ self.weight
            return self._times(d_logits.bfloat16(), self._short_weight())

    def accumulate(self, d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
        """Add this chunk's [V, H] gradient of the weight in place."""
        with self._exact():
            if not self._reduced:
                d_weight.addmm_(d_logits.T, hidden.to(self.dtype))
            else:
                # Transposed: with a large vocabulary twice as fast on CPU (measured).
                d_weight += self._times(hidden.bfloat16().T, d_logits.bfloat16()).T

    def _short_weight(self) -> Tensor:
        if self._short is None:
            self._short = self.weight.bfloat16()
        return self._short

    def _times(self, a: Tensor, b: Tensor) -> Tensor:
        if self._wide_results:
            product: Tensor = torch.mm(a, b, out_dtype=torch.float32)
            return product
        return a @ b
