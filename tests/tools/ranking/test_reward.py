import numpy as np
import pytest

from genrec.errors import GenrecError
from genrec.tools.ranking.reward import ranking_reward


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(None, [0.2, 0.8]), ({"like": 1, "follow": 3}, [0.35, 0.2]), ({"follow": 0.01}, [0.4, 0.0])],
)
def test_rewards_are_weighted_means(weights: dict[str, float] | None, expected: list[float]) -> None:
    rates = np.array([[0.2, 0.4], [0.8, 0.0]])
    found = ranking_reward(rates, ("like", "follow"), weights)
    assert found.dtype == np.float32 and found == pytest.approx(np.array(expected, np.float32))


@pytest.mark.parametrize("weights", [{"share": 1.0}, {}, {"like": 0.0}, {"like": -1.0}, {"like": float("inf")}])
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(GenrecError):
        ranking_reward(np.zeros((1, 2)), ("like", "follow"), weights)
