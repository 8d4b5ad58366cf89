"""What the importance corrections do to the expected policy gradient, by exact enumeration.

Three tokens (0 ends the answer), at most three of them: 15 answers, so every expectation is a sum.
The policy of now has made eight optimiser steps; the behaviour policy is `lag` of them behind. The
gradient that the project's own losses give is weighted with the behaviour's probability of each
answer and compared with formulas written out below in numpy, without autograd.

Bias of E[g] against the true gradient of J = E[reward], with w the weight and rho = pi / mu:

    sequence-tis, cap not reached    none
    sequence-tis, cap reached        E|rho - min(rho, C)| |A| |grad log pi| at most
    token-tis, decoupled, ...        answers continue, and states are reached, as under mu
    token-mask, sequence-mask        what was dropped, nothing else: the denominator stays
    none                             everything is as under mu

Sums over tokens per answer ("seq-mean-token-sum") throughout: only they estimate grad J itself even
at lag 0 ("token-mean" divides by a random number of tokens).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.algorithms.importance import Correction, importance_weights
from learner.algorithms.masked import aggregate
from learner.algorithms.policy_loss import POLICY_LOSSES
from learner.compute.optimizer import make_optimizer

Array = np.ndarray[Any, np.dtype[np.float64]]

V, T, END = 3, 3, 0
START = V  # row of the "last token" table before the first token
UPDATES, LAGS = 8, (0, 1, 2, 4, 8)
FAR = 1e6  # a cap that is never reached
BASELINE = 0.3

ANSWERS: list[tuple[int, ...]] = [
    answer
    for n in range(1, T + 1)
    for answer in itertools.product(range(V), repeat=n)
    if END not in answer[:-1] and (n == T or answer[-1] == END)
]
REWARDS: Array = np.random.default_rng(4).normal(size=len(ANSWERS)) * 1.5
ADVANTAGES: Array = REWARDS - BASELINE  # a constant baseline changes no expectation of grad J

IDS = torch.tensor([[*answer, *[0] * (T - len(answer))] for answer in ANSWERS])
BEFORE = torch.cat([torch.full((len(ANSWERS), 1), START), IDS[:, :-1]], dim=1)
MASK = torch.tensor([[t < len(answer) for t in range(T)] for answer in ANSWERS])
SCORES = torch.from_numpy(ADVANTAGES)[:, None].expand(-1, T)


# -- the project's side: autograd through its own losses -------------------------------------------


def _logp(theta: Tensor) -> Tensor:
    """[15, 3] log pi of each token; logits are one row per last token plus one per position."""
    by_token, by_place = theta[: (V + 1) * V].view(V + 1, V), theta[(V + 1) * V :].view(T, V)
    every = (by_token[BEFORE] + by_place[None]).log_softmax(-1)
    return every.gather(-1, IDS[..., None]).squeeze(-1).where(MASK, 0.0)


def _gradients(
    theta: Tensor, prox: Tensor, mu: Tensor, mode: Correction, cap: float, loss: str = "ppo"
) -> Array:
    """[15, 21]: minus the gradient of the loss of each answer alone, as `PolicyUpdate` forms it:
    token losses times weights, then `aggregate` over the original mask."""
    theta = theta.clone().requires_grad_()
    behaviour, proximal = _logp(mu).detach(), _logp(prox).detach()
    weights, _ = importance_weights(proximal, behaviour, MASK, mode, cap)
    losses = POLICY_LOSSES[loss](_logp(theta), proximal, SCORES, MASK).losses
    rows = []
    for i in range(len(ANSWERS)):
        own = slice(i, i + 1)
        total = aggregate((losses * weights)[own], MASK[own], "seq-mean-token-sum", 1)
        rows.append(-torch.autograd.grad(total, theta, retain_graph=True)[0].numpy())
    return np.stack(rows)


def _expected(theta: Tensor, mu: Tensor, mode: Correction, cap: float = FAR, **other: Any) -> Array:
    """[21] expectation over answers of mu, at the first minibatch (prox is theta) unless told."""
    found = _gradients(theta, other.pop("prox", theta), mu, mode, cap, **other)
    return _chance(mu) @ found


def _chance(theta: Tensor) -> Array:
    return np.asarray(_logp(theta).detach().sum(1).exp().numpy())


def _history() -> list[Tensor]:
    """Parameters before the first and after each of nine PPO updates on 48 sampled answers."""
    generator = torch.Generator().manual_seed(1)
    start = 0.8 * torch.randn((V + 1) * V + T * V, generator=generator, dtype=torch.float64)
    theta = torch.nn.Parameter(start)
    optimizer = make_optimizer([theta], 0.12, (0.9, 0.95), 1e-5, 0.0)
    kept = [start.clone()]
    for _ in range(UPDATES + 1):
        prox = _logp(theta).detach()
        rows = torch.multinomial(prox.sum(1).exp(), 48, replacement=True, generator=generator)
        mask = MASK[rows]
        losses = POLICY_LOSSES["ppo"](_logp(theta)[rows], prox[rows], SCORES[rows], mask)
        optimizer.zero_grad()
        aggregate(losses.losses, mask, "seq-mean-token-sum", 48).backward()
        optimizer.step()
        kept.append(theta.detach().clone())
    return kept


HISTORY = _history()
NOW = HISTORY[UPDATES]
AFTER = HISTORY[UPDATES + 1]  # one minibatch later


def _at(lag: int) -> Tensor:
    return HISTORY[UPDATES - lag]


# -- the other side: the same policy by hand -------------------------------------------------------


class Plain:
    """The policy in numpy: probabilities and gradients of log-probabilities, token by token."""

    def __init__(self, theta: Tensor) -> None:
        flat = theta.numpy()
        self.by_token = flat[: (V + 1) * V].reshape(V + 1, V)
        self.by_place = flat[(V + 1) * V :].reshape(T, V)

    def step(self, before: int, place: int) -> Array:
        """[3] probabilities of the next token."""
        logits = self.by_token[before] + self.by_place[place]
        e = np.exp(logits - logits.max())
        return np.asarray(e / e.sum())

    def tokens(self, answer: tuple[int, ...]) -> list[tuple[float, Array]]:
        """(probability, gradient [21] of its logarithm) of each token of an answer."""
        found, before = [], START
        for place, token in enumerate(answer):
            p = self.step(before, place)
            lift = np.eye(V)[token] - p
            gradient = np.zeros((V + 1) * V + T * V)
            gradient[before * V : before * V + V] = lift
            gradient[(V + 1) * V + place * V :][:V] = lift
            found.append((float(p[token]), gradient))
            before = token
        return found

    def chance(self, answer: tuple[int, ...]) -> float:
        return float(np.prod([p for p, _ in self.tokens(answer)]))


def _sum(term: Callable[[int, tuple[int, ...]], Array]) -> Array:
    return np.sum([term(i, answer) for i, answer in enumerate(ANSWERS)], axis=0)


def true_gradient(theta: Tensor) -> Array:
    """grad J = sum over answers of pi(y) R(y) grad log pi(y), without any baseline."""
    pi = Plain(theta)
    return _sum(
        lambda i, y: pi.chance(y) * REWARDS[i] * np.sum([g for _, g in pi.tokens(y)], axis=0)
    )


def by_tokens(theta: Tensor, mu: Tensor, weight: Callable[[float], float]) -> Array:
    """E over mu of sum over tokens of weight(rho_t) A grad log pi."""
    pi, old = Plain(theta), Plain(mu)

    def term(i: int, y: tuple[int, ...]) -> Array:
        both = zip(pi.tokens(y), old.tokens(y), strict=True)
        return (
            old.chance(y)
            * ADVANTAGES[i]
            * np.sum([weight(p / q) * g for (p, g), (q, _) in both], axis=0)
        )

    return _sum(term)


def by_answers(theta: Tensor, mu: Tensor, weight: Callable[[float], float]) -> Array:
    """E over mu of weight(rho of the answer) A grad log pi of the answer."""
    pi, old = Plain(theta), Plain(mu)
    return _sum(
        lambda i, y: (
            old.chance(y)
            * weight(pi.chance(y) / old.chance(y))
            * ADVANTAGES[i]
            * np.sum([g for _, g in pi.tokens(y)], axis=0)
        )
    )


def half_corrected(theta: Tensor, mu: Tensor) -> Array:
    """Token weights without a cap, from states and actions instead of answers: each prefix is
    reached as under mu, its next token is drawn from pi, and the rest follows mu again."""
    pi, old = Plain(theta), Plain(mu)

    def visit(prefix: tuple[int, ...], reached: float) -> Array:
        if len(prefix) == T or (prefix and prefix[-1] == END):
            return np.zeros((V + 1) * V + T * V)
        total = np.zeros((V + 1) * V + T * V)
        before = prefix[-1] if prefix else START
        for token in range(V):
            longer = (*prefix, token)
            chance, gradient = pi.tokens(longer)[-1]
            total += reached * chance * value(longer) * gradient
            total += visit(longer, reached * float(old.step(before, len(prefix))[token]))
        return total

    def value(prefix: tuple[int, ...]) -> float:
        """Mean advantage of the answers that begin so, continued by mu."""
        if prefix in ANSWERS:
            return float(ADVANTAGES[ANSWERS.index(prefix)])
        p = old.step(prefix[-1], len(prefix))
        return sum(float(p[token]) * value((*prefix, token)) for token in range(V))

    return visit((), 1.0)


def _close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def _bias(found: Array) -> float:
    """Distance to the true gradient, in parts of its length."""
    truth = true_gradient(NOW)
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def _bound(mu: Tensor, error: Callable[[float, float], float]) -> float:
    """E over mu of sum over tokens of |error(rho_t, rho of the answer)| |A| |grad log pi|, in parts
    of the true gradient's length: what the triangle inequality leaves of a bias."""
    pi, old = Plain(NOW), Plain(mu)
    total = 0.0
    for i, y in enumerate(ANSWERS):
        whole = pi.chance(y) / old.chance(y)
        for (p, g), (q, _) in zip(pi.tokens(y), old.tokens(y), strict=True):
            total += (
                old.chance(y)
                * abs(error(p / q, whole))
                * abs(ADVANTAGES[i])
                * float(np.linalg.norm(g))
            )
    return total / float(np.linalg.norm(true_gradient(NOW)))


# -- tests -----------------------------------------------------------------------------------------

CAP = 1.1  # low, so that it cuts from lag 2 on
TOKEN_MODES: tuple[Correction, ...] = ("token-tis", "decoupled")
MODES: tuple[Correction, ...] = (
    "decoupled", "token-tis", "sequence-tis", "token-mask", "sequence-mask",
)  # fmt: skip


def _most(ratio: float) -> float:
    return min(ratio, CAP)


def _kept(ratio: float) -> float:
    return ratio if ratio <= CAP else 0.0


def test_the_enumeration_is_complete_and_the_lags_are_real() -> None:
    assert len(ANSWERS) == 15
    for theta in HISTORY:
        assert _chance(theta).sum() == pytest.approx(1.0, abs=1e-12)
        for i, answer in enumerate(ANSWERS):
            assert Plain(theta).chance(answer) == pytest.approx(_chance(theta)[i], abs=1e-14)
    pi = Plain(NOW)
    whole = {lag: [pi.chance(y) / Plain(_at(lag)).chance(y) for y in ANSWERS] for lag in LAGS}
    assert [lag for lag in LAGS if max(whole[lag]) > CAP] == [2, 4, 8]
    assert max(whole[8]) > 5.0
    assert min(whole[8]) < 0.05


def test_the_true_gradient_is_that_of_the_expected_reward() -> None:
    theta = NOW.clone().requires_grad_()
    reward = (_logp(theta).sum(1).exp() * torch.from_numpy(REWARDS)).sum()
    _close(true_gradient(NOW), torch.autograd.grad(reward, theta)[0].numpy())


@pytest.mark.parametrize("loss", ["ppo", "reinforce", "cispo"])
@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_on_policy_every_correction_gives_the_true_gradient(mode: Correction, loss: str) -> None:
    _close(_expected(NOW, NOW, mode, CAP, loss=loss), true_gradient(NOW))


@pytest.mark.parametrize("lag", LAGS)
def test_sequence_weights_below_their_cap_have_no_bias(lag: int) -> None:
    _close(_expected(NOW, _at(lag), "sequence-tis"), true_gradient(NOW))
    _close(_expected(NOW, _at(lag), "sequence-mask"), true_gradient(NOW))


@pytest.mark.parametrize("lag", LAGS)
def test_capped_sequence_weights_are_off_by_what_the_cap_takes(lag: int) -> None:
    found = _expected(NOW, _at(lag), "sequence-tis", CAP)
    _close(found, by_answers(NOW, _at(lag), _most))
    _close(true_gradient(NOW) - found, by_answers(NOW, _at(lag), lambda r: r - _most(r)))
    assert _bias(found) <= _bound(_at(lag), lambda _, whole: whole - _most(whole)) + 1e-12


@pytest.mark.parametrize("mode", TOKEN_MODES)
@pytest.mark.parametrize("lag", LAGS)
def test_token_weights_correct_the_token_and_leave_its_past_and_future(
    mode: Correction, lag: int
) -> None:
    found = _expected(NOW, _at(lag), mode)
    _close(found, half_corrected(NOW, _at(lag)))
    _close(found, by_tokens(NOW, _at(lag), lambda r: r))
    assert _bias(found) <= _bound(_at(lag), lambda token, whole: whole - token) + 1e-12


@pytest.mark.parametrize("mode", TOKEN_MODES)
@pytest.mark.parametrize("lag", LAGS)
def test_capped_token_weights(mode: Correction, lag: int) -> None:
    found = _expected(NOW, _at(lag), mode, CAP)
    _close(found, by_tokens(NOW, _at(lag), _most))
    assert _bias(found) <= _bound(_at(lag), lambda token, whole: whole - _most(token)) + 1e-12


@pytest.mark.parametrize("lag", LAGS)
def test_masks_leave_the_kept_set_with_the_original_denominator(lag: int) -> None:
    """The kept answers count as they do in grad J: not a bit more because others are gone."""
    by_token = _expected(NOW, _at(lag), "token-mask", CAP)
    _close(by_token, by_tokens(NOW, _at(lag), _kept))
    assert _bias(by_token) <= _bound(_at(lag), lambda t, whole: whole - _kept(t)) + 1e-12
    pi, old = Plain(NOW), Plain(_at(lag))
    kept = [pi.chance(y) <= CAP * old.chance(y) for y in ANSWERS]
    under_pi = _sum(
        lambda i, y: (
            kept[i] * pi.chance(y) * ADVANTAGES[i] * np.sum([g for _, g in pi.tokens(y)], axis=0)
        )
    )
    by_answer = _expected(NOW, _at(lag), "sequence-mask", CAP)
    _close(by_answer, under_pi)
    assert _bias(by_answer) <= _bound(_at(lag), lambda _, whole: whole - _kept(whole)) + 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_two_expects_what_one_answer_does(mode: Correction) -> None:
    """All 225 pairs of answers in one `aggregate`; with the survivors as denominator, a mask that
    drops one of two would double the weight of the other."""
    mu, theta = _at(8), NOW.clone().requires_grad_()
    first, second = (torch.arange(15).repeat_interleave(15), torch.arange(15).repeat(15))
    behaviour, proximal = _logp(mu).detach(), _logp(NOW).detach()
    weights, _ = importance_weights(proximal, behaviour, MASK, mode, CAP)
    losses = POLICY_LOSSES["ppo"](_logp(theta), proximal, SCORES, MASK).losses * weights
    chance = torch.from_numpy(_chance(mu))
    total = torch.zeros((), dtype=torch.float64)
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        both = [i, j]
        one = aggregate(losses[both], MASK[both], "seq-mean-token-sum", len(both))
        total = total + chance[i] * chance[j] * one
    _close(-torch.autograd.grad(total, theta)[0].numpy(), _expected(NOW, mu, mode, CAP))


@pytest.mark.parametrize("lag", LAGS)
def test_without_correction_everything_is_as_under_mu(lag: int) -> None:
    found = _expected(NOW, _at(lag), "none")
    _close(found, by_tokens(NOW, _at(lag), lambda _: 1.0))
    assert _bias(found) <= _bound(_at(lag), lambda _, whole: whole - 1.0) + 1e-12


@pytest.mark.parametrize("lag", LAGS)
def test_after_a_minibatch_the_clip_goes_with_the_proximal_policy(lag: int) -> None:
    """theta has left prox: tokens count with rho * r = pi / mu, and the clip takes away those that
    have gone far enough from PROX, however far they are from mu."""
    mu, pi = Plain(_at(lag)), Plain(AFTER)
    prox, clipped = Plain(NOW), 0

    def term(i: int, y: tuple[int, ...]) -> Array:
        nonlocal clipped
        total = np.zeros((V + 1) * V + T * V)
        for (p, g), (q, _), (m, _) in zip(pi.tokens(y), prox.tokens(y), mu.tokens(y), strict=True):
            gone = p / q > 1.2 if ADVANTAGES[i] > 0 else p / q < 0.8
            clipped += gone
            total += 0.0 if gone else min(q / m, CAP) * (p / q) * g
        return mu.chance(y) * ADVANTAGES[i] * total

    expected = _sum(term)
    assert clipped > 0, "no token is clipped: this test shows nothing"
    _close(_expected(AFTER, _at(lag), "decoupled", CAP, prox=NOW), expected)


def test_the_uncorrected_bias_is_visibly_the_largest() -> None:
    biases = {
        lag: {
            mode: _bias(_expected(NOW, _at(lag), mode, 5.0))
            for mode in ("none", "decoupled", "sequence-tis")
        }
        for lag in LAGS
    }
    for lag in (4, 8):
        assert biases[lag]["decoupled"] < 0.2 * biases[lag]["none"], biases
        assert biases[lag]["sequence-tis"] < 0.1 * biases[lag]["none"], biases
    growing = [biases[lag]["none"] for lag in LAGS]
    assert growing == sorted(growing)
    assert growing[-1] > 1.0, "the error is longer than the gradient"


def _drawn(mu: Tensor, count: int, seed: int) -> list[int]:
    """Answers sampled token by token, as numbers into ANSWERS."""
    old, rng = Plain(mu), np.random.default_rng(seed)
    found = []
    for _ in range(count):
        answer: tuple[int, ...] = ()
        while len(answer) < T and END not in answer:
            p = old.step(answer[-1] if answer else START, len(answer))
            answer = (*answer, int(np.searchsorted(np.cumsum(p), rng.random())))
        found.append(ANSWERS.index(answer))
    return found


def test_sampled_gradients_agree_with_the_true_one_and_uncorrected_ones_do_not() -> None:
    """20 000 answers of the policy eight updates ago, along the true gradient: within three
    standard errors with sequence weights, far outside without."""
    truth = true_gradient(NOW)
    direction, rows = truth / np.linalg.norm(truth), _drawn(_at(8), 20_000, seed=2)
    deviations = {}
    for mode in ("sequence-tis", "none"):
        along = (_gradients(NOW, NOW, _at(8), mode, FAR) @ direction)[rows]
        error = along.std(ddof=1) / np.sqrt(len(along))
        deviations[mode] = abs(along.mean() - truth @ direction) / error
    assert deviations["sequence-tis"] < 3.0, deviations
    assert deviations["none"] > 6.0, deviations
