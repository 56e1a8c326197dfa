"""Group advantages and the target floor: exactly the right ones are zeroed, and nothing missing does harm."""

from __future__ import annotations

import pytest
import torch

from genrec.alignment.advantages import group_advantages, suppressed

NAN = float("nan")


def target_floor(
    advantages: torch.Tensor, rewards: torch.Tensor, target: torch.Tensor, hits: torch.Tensor
) -> torch.Tensor:
    return advantages.masked_fill(suppressed(advantages, rewards, target, hits), 0.0)


def test_advantages_are_the_standardised_rewards_of_a_group() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 1.0]])
    found = group_advantages(rewards)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(found, expected)
    assert torch.allclose(group_advantages(rewards, divide=False), rewards - rewards.mean(1, keepdim=True))


@pytest.mark.parametrize(
    "rewards", [[0.3, 0.3, 0.3], [0.1 + 0.2, 0.3, 0.3], [NAN, NAN, NAN], [NAN, 0.7, NAN], [0.5]],
    ids=["equal", "equal but for rounding", "all missing", "one left", "a group of one"],
)  # fmt: skip
def test_groups_that_say_nothing_have_advantages_of_zero(rewards: list[float]) -> None:
    assert group_advantages(torch.tensor([rewards], dtype=torch.float64)).tolist() == [[0.0] * len(rewards)]


def test_a_missing_reward_leaves_only_its_completion_out() -> None:
    found = group_advantages(torch.tensor([[1.0, NAN, 3.0, 5.0]]))
    assert torch.allclose(found[:, [0, 2, 3]], group_advantages(torch.tensor([[1.0, 3.0, 5.0]])))
    assert found[0, 1] == 0


def test_an_empty_group_stays_empty() -> None:
    assert group_advantages(torch.zeros(3, 0)).shape == (3, 0)
    assert target_floor(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2), torch.zeros(2, 0).bool()).shape == (2, 0)


def test_the_floor_zeroes_exactly_positive_advantages_below_the_target() -> None:
    rewards = torch.tensor([[0.9, 0.5, 0.49, 0.1, 0.5]])
    advantages = torch.tensor([[1.0, 0.8, 0.7, -2.0, 0.0]])
    target, hits = torch.tensor([0.5]), torch.zeros(1, 5, dtype=torch.bool)
    assert target_floor(advantages, rewards, target, hits).tolist() == [pytest.approx([1.0, 0.8, 0.0, -2.0, 0.0])]
    assert suppressed(advantages, rewards, target, hits).tolist() == [[False, False, True, False, False]]


def test_an_exact_hit_is_never_suppressed() -> None:
    advantages, rewards = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.4, 0.4]])
    hits = torch.tensor([[True, False]])
    assert target_floor(advantages, rewards, torch.tensor([0.5]), hits).tolist() == [[1.0, 0.0]]


def test_a_target_without_a_reward_sets_no_floor() -> None:
    advantages, rewards = torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.zeros(2, 2)
    hits = torch.zeros(2, 2, dtype=torch.bool)
    found = target_floor(advantages, rewards, torch.tensor([NAN, 1.0]), hits)
    assert found.tolist() == [[1.0, -1.0], [0.0, -1.0]]
