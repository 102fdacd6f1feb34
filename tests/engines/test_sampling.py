"""Choosing tokens: greedy by default, repeatable with a seed, never from nonsense."""

from __future__ import annotations

import math

import pytest
import torch

from thermocline.engines.sampling import NotFiniteError, Sampler, Sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0], dtype=torch.bfloat16)


def draw(count: int, sampling: Sampling) -> list[int]:
    """So many tokens from the same logits."""
    sampler = Sampler(sampling)
    return [sampler.choose(LOGITS).token for _ in range(count)]


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    """Temperature 0 has no randomness in it."""
    assert draw(5, Sampling()) == [1] * 5


def test_a_seed_repeats_the_tokens() -> None:
    """Equal seeds draw equal tokens, whatever was drawn elsewhere meanwhile; other seeds draw others."""
    first = draw(50, Sampling(1.0, seed=7))
    torch.rand(3)
    assert draw(50, Sampling(1.0, seed=7)) == first
    assert draw(50, Sampling(1.0, seed=-8)) != first
    assert draw(50, Sampling(1.0)) != draw(50, Sampling(1.0))


def test_top_p_leaves_out_the_unlikely() -> None:
    """Only the likeliest tokens that make up the share are drawn, at least one of them."""
    assert set(draw(300, Sampling(1.0, 0.7, seed=1))) == {1, 3}
    assert set(draw(50, Sampling(1.0, 1e-9, seed=1))) == {1}
    assert set(draw(1000, Sampling(2.0, 1.0, seed=1))) == {0, 1, 2, 3, 4}


def test_probabilities_come_with_the_choice() -> None:
    """The logarithm of the chosen token's probability and the likeliest tokens, as many as asked."""
    choice = Sampler(Sampling(), logprobs=2).choose(LOGITS)
    shares = LOGITS.float().softmax(0)
    assert choice.logprob == pytest.approx(math.log(shares[1]))
    assert {token for token, _ in choice.likeliest} == {1, 3}
    assert Sampler(Sampling(), logprobs=0).choose(LOGITS).likeliest == ()
    assert Sampler(Sampling()).choose(LOGITS).logprob is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nonsense_is_an_error(bad: float, temperature: float) -> None:
    """No token follows from a number that is not finite."""
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(NotFiniteError):
        Sampler(Sampling(temperature)).choose(logits)
