"""KL estimators by enumeration over a tiny vocabulary, and controllers by hand-worked traces."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.algorithms.kl import KL_ESTIMATORS, AdaptiveKL, FixedKL, k1, k2, k3, k3_plus

LOGITS = torch.tensor([0.3, -1.1, 0.8, 0.0, 1.4], dtype=torch.float64)
REF_LOGP = torch.tensor([-0.2, 0.5, 0.1, -0.9, 0.7], dtype=torch.float64).log_softmax(0)


def _exact_kl(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(0)
    return (logp.exp() * (logp - REF_LOGP)).sum()


def _expected(estimator: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> Tensor:
    """Mean over tokens drawn from the policy; the draw itself carries no gradient."""
    logp = logits.log_softmax(0)
    return (logp.detach().exp() * estimator(logp, REF_LOGP)).sum()


def _gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def test_estimators_by_hand() -> None:
    logp = torch.tensor([math.log(0.5), math.log(0.25)], dtype=torch.float64)
    ref = torch.tensor([math.log(0.25), math.log(0.5)], dtype=torch.float64)
    log2 = math.log(2)
    assert k1(logp, ref).tolist() == pytest.approx([log2, -log2])
    assert k2(logp, ref).tolist() == pytest.approx([log2**2 / 2, log2**2 / 2])
    assert k3(logp, ref).tolist() == pytest.approx([0.5 - 1 + log2, 2 - 1 - log2])
    assert torch.equal(k3_plus(logp, ref), k3(logp, ref))


@pytest.mark.parametrize("estimator", [k1, k3, k3_plus])
def test_unbiased_estimators_have_the_exact_kl_as_their_mean(
    estimator: Callable[[Tensor, Tensor], Tensor],
) -> None:
    assert _expected(estimator, LOGITS).item() == pytest.approx(_exact_kl(LOGITS).item(), abs=1e-12)


def test_k2_is_biased_in_value() -> None:
    assert abs(_expected(k2, LOGITS) - _exact_kl(LOGITS)).item() > 1e-2


@pytest.mark.parametrize("estimator", [k2, k3_plus])
def test_gradient_as_a_loss_is_that_of_the_kl(
    estimator: Callable[[Tensor, Tensor], Tensor],
) -> None:
    found = _gradient(lambda logits: _expected(estimator, logits))
    torch.testing.assert_close(found, _gradient(_exact_kl), atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_gradient_of_k1_and_k3_as_a_loss_is_wrong(
    estimator: Callable[[Tensor, Tensor], Tensor],
) -> None:
    found = _gradient(lambda logits: _expected(estimator, logits))
    assert (found - _gradient(_exact_kl)).abs().max() > 1e-2


def test_k1_in_the_reward_has_the_gradient_of_the_kl() -> None:
    def score_function(logits: Tensor) -> Tensor:
        logp = logits.log_softmax(0)
        return (logp.detach().exp() * k1(logp, REF_LOGP).detach() * logp).sum()

    torch.testing.assert_close(_gradient(score_function), _gradient(_exact_kl), atol=1e-12, rtol=0)


def test_k3_is_never_negative_and_exactly_zero_at_equality() -> None:
    x = torch.linspace(-3, 3, 1001)
    assert (k3(x, torch.zeros_like(x)) >= 0).all()
    for estimator in KL_ESTIMATORS.values():
        assert torch.equal(estimator(x, x), torch.zeros_like(x))


def test_clamps_keep_wild_ratios_finite() -> None:
    logp, ref = torch.tensor([-1e4, 0.0, -4.0]), torch.tensor([0.0, -1e4, 0.0])
    assert k1(logp, ref).tolist() == [-20.0, 20.0, -4.0]
    assert k2(logp, ref).tolist() == [200.0, 200.0, 8.0]
    assert k3(logp, ref).tolist() == [10.0, 10.0, 10.0]


# Not k3+: it is straight-through, so its gradient is by design not that of its value.
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_gradcheck(name: str) -> None:
    logp = torch.linspace(-2, 2, 7, dtype=torch.float64, requires_grad=True)
    ref = torch.zeros(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: KL_ESTIMATORS[name](x, ref), logp)


def test_adaptive_kl_trace_by_hand() -> None:
    controller = AdaptiveKL(initial=0.2, target=6.0, horizon=10_000)
    controller.update(12.0, 500)  # error 1 clipped to .2: factor 1.01
    assert controller.coef == pytest.approx(0.202)
    controller.update(6.6, 1000)  # error .1: factor 1.01
    assert controller.coef == pytest.approx(0.20402)
    controller.update(6.0, 1000)  # on target
    assert controller.coef == pytest.approx(0.20402)
    controller.update(-1.0, 5000)  # error clipped to -.2: factor .9
    assert controller.coef == pytest.approx(0.183618)


def test_controller_state_survives_a_restart() -> None:
    first = AdaptiveKL(initial=0.2, target=6.0, horizon=10_000)
    first.update(12.0, 500)
    second = AdaptiveKL(initial=0.7, target=6.0, horizon=10_000)
    second.load_state_dict(first.state_dict())
    first.update(3.0, 64)
    second.update(3.0, 64)
    assert first.coef == second.coef
    assert type(first.state_dict()["coef"]) is float


def test_fixed_kl_never_moves() -> None:
    controller = FixedKL(0.05)
    controller.update(100.0, 512)
    controller.load_state_dict(controller.state_dict())
    assert controller.coef == 0.05


def test_controllers_refuse_nonsense() -> None:
    adaptive = AdaptiveKL(initial=0.2, target=6.0, horizon=100)
    with pytest.raises(ValueError, match="KL of nan"):
        adaptive.update(math.nan, 8)
    with pytest.raises(ValueError, match="too large for a KL horizon of 100"):
        adaptive.update(0.0, 500)
    with pytest.raises(ValueError, match="another KL controller"):
        adaptive.load_state_dict(FixedKL(0.1).state_dict())
    with pytest.raises(ValueError, match="another KL controller"):
        FixedKL(0.1).load_state_dict(adaptive.state_dict())
    with pytest.raises(ValueError, match="must be positive"):
        AdaptiveKL(initial=0.2, target=0.0, horizon=100)
    with pytest.raises(ValueError, match="not negative"):
        FixedKL(-0.1)
    assert adaptive.coef == 0.2


def test_a_fixed_coefficient_that_a_monitor_has_set_is_kept() -> None:
    before, after = FixedKL(0.05), FixedKL(0.05)
    before.coef = 0.2
    after.load_state_dict(before.state_dict())
    assert after.coef == 0.2
    after.load_state_dict({})  # of a checkpoint from when it could not change
    assert after.coef == 0.2
