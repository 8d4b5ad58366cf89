from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from actors.engines.drawing import draw  # noqa: E402


def test_tokens_come_with_the_probabilities_they_are_drawn_with() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.5, -2.0, -math.inf, 0.7])
    count = 40_000
    tokens, logprobs = draw(logits.expand(count, -1).contiguous())
    expected = logits.softmax(-1)
    found = torch.bincount(tokens, minlength=5) / count
    # Five standard errors of a binomial share.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()
    assert torch.allclose(logprobs, logits.log_softmax(-1)[tokens], atol=1e-6)


def test_a_forbidden_token_is_never_drawn_even_at_the_ends() -> None:
    torch.manual_seed(1)
    logits = torch.zeros(5000, 7)
    logits[:, [0, 3, 6]] = -math.inf
    tokens, logprobs = draw(logits)
    assert set(tokens.tolist()) == {1, 2, 4, 5}
    assert torch.allclose(logprobs, torch.full((5000,), -math.log(4.0)))


def test_small_probabilities_of_a_large_vocabulary_are_not_lost() -> None:
    """A float32 sum over 2^17 equal tokens behind a likely one would be wrong by whole percents."""
    torch.manual_seed(2)
    size = 1 << 17
    logits = torch.zeros(1, size)
    logits[0, 0] = math.log(size)  # as likely as all others together
    tokens, _ = draw(logits.expand(200, -1).contiguous())
    others = tokens[tokens > 0]
    assert 65 <= len(others) <= 135
    assert 0.3 < float((others < size // 2).float().mean()) < 0.7


def test_a_row_with_a_source_of_its_own_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))

    def third(rows: list[int], seed: int) -> int:
        place = rows.index(2)
        generators = {place: torch.Generator().manual_seed(seed)}
        return int(draw(logits[rows].clone(), generators)[0][place])

    alone = [third([2], seed) for seed in range(20)]
    assert [third([0, 1, 2, 4], seed) for seed in range(20)] == alone
    assert len(set(alone)) > 3


def test_a_greedy_row_takes_the_most_probable_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 50)
    greedy = torch.tensor([True] * 25 + [False] * 25)
    tokens, logprobs = draw(logits, None, greedy)
    assert tokens[:25].tolist() == [1] * 25
    assert len(set(tokens[25:].tolist())) > 1
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
