import numpy as np
import pytest
import torch

from genrec.errors import GenrecError
from genrec.tools.ranking.attention import BUCKETS, Stack, distance_buckets
from genrec.tools.ranking.heads import MMoE, bce, blank
from genrec.tools.ranking.models import KINDS, RankerConfig, RankerModel
from genrec.tools.ranking.task import Task
from tests.tools.small_world import rated


def stack(layers: int = 3, n: int = 4, top: int = 0) -> Stack:
    torch.manual_seed(0)
    made = Stack(8, layers, 2, n, 2, top)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return made.eval()


def test_distances_have_buckets_of_growing_width() -> None:
    found = distance_buckets(torch.tensor([1, 2, 3, 4, 5, 7, 8, 15, 16, 10_000, 10**9])).tolist()
    assert found[:7] == [0, 1, 2, 3, 4, 4, 5] and found[7:9] == [5, 6] and max(found) == BUCKETS - 1
    assert found == sorted(found)


@pytest.mark.parametrize("top", [0, 2])
@torch.no_grad()
def test_targets_with_exact_states_are_the_causal_transformer(top: int) -> None:
    """Position t of the sequence, for every t, against the states of the n positions before it."""
    made = stack(top=top)
    x, feedback = torch.randn(2, 9, 8), torch.randn(2, 9, 2)
    known = torch.tensor([[0, 1, 2, 2, 2, 5, 6, 7, 8], list(range(9))])  # of the first, 2 to 4 are of one moment
    whole, states = made.sequence(x, feedback, known)
    assert torch.equal(made.states(x, feedback, known), states)
    for t in range(9):
        at = torch.arange(t - 4, t)
        there = (at >= 0) & (at < known[:, t, None])
        at = at.clamp(min=0)
        memory = made.memory(x[:, at], feedback[:, at], states[:, at], there)
        found, fresh, _ = made.targets(x[:, t : t + 1], memory, there)
        assert (found[:, 0] - whole[:, t]).abs().max() < 1e-5
        assert (fresh[:, 0] - states[:, t]).abs().max() < 1e-5


@torch.no_grad()
def test_the_transformer_sees_no_later_event_and_none_beyond_its_reach() -> None:
    made = stack(layers=1)
    x, feedback = torch.randn(1, 9, 8), torch.randn(1, 9, 2)
    before, _ = made.sequence(x, feedback)
    for changed, touched in ((8, [8]), (3, range(3, 8))):
        other = x.clone()
        other[:, changed] = torch.randn(8)
        after, _ = made.sequence(other, feedback)
        moved = (after - before).abs().amax((0, 2)) > 1e-6
        assert moved.nonzero().flatten().tolist() == list(touched)
    told = feedback.clone()
    told[:, 4] = torch.randn(2)  # an event's own feedback is not known when it is scored
    assert ((made.sequence(x, told)[0] - before).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist() == [5, 6, 7, 8]


@torch.no_grad()
def test_missing_states_and_empty_histories_are_served() -> None:
    made = stack()
    there = torch.tensor([[False] * 4, [True] * 4])
    x, level0, feedback = torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 2)
    cached = torch.full((2, 4, 2, 8), torch.nan)
    found, _, _ = made.targets(x, made.memory(level0, feedback, cached, torch.zeros(2, 4, dtype=torch.bool)), there)
    assert torch.isfinite(found).all()
    same, _, _ = made.targets(x, made.memory(level0, feedback, None, None), there)
    assert torch.equal(found, same)
    other, _, _ = made.targets(x, made.memory(level0.flip(1), feedback, None, None), there)
    assert torch.allclose(other[0], found[0], atol=1e-6) and not torch.allclose(other[1], found[1], atol=1e-3)


@torch.no_grad()
def test_the_search_of_each_layer_is_exact_attention_over_its_best() -> None:
    made, few = stack(layers=1), stack(layers=1, top=2)
    x, level0, feedback = torch.randn(1, 1, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 2)
    there = torch.ones(1, 4, dtype=torch.bool)
    seen = made.layers[0].seen(made.memory(level0, feedback, None, None)[0])
    distance = torch.arange(4, 0, -1)
    logits = made.layers[0].logits(x, seen, made.layers[0].bias(distance_buckets(distance))[None, :, None])
    best = logits.mean(1)[0, 0, 1:].topk(2).indices
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, best] = True
    expected, _, _ = made.targets(x, made.memory(level0, feedback, None, None), mask)
    found, _, _ = few.targets(x, few.memory(level0, feedback, None, None), there)
    assert torch.allclose(found, expected, atol=1e-6)


@torch.no_grad()
def test_attention_weights_are_shares() -> None:
    made = stack()
    there = torch.tensor([[False, True, True, True]])
    shares = made.weights(
        torch.randn(1, 5, 8), made.memory(torch.randn(1, 4, 8), torch.randn(1, 4, 2), None, None), there
    )
    assert shares.shape == (1, 5, 3, 4) and (shares[..., 0] == 0).all()
    assert (shares.sum(-1) < 1).all() and (shares >= 0).all()


def test_mmoe_gates_mix_experts() -> None:
    torch.manual_seed(0)
    made = MMoE(6, 3)
    x = torch.randn(4, 2, 6)
    out = made(x)
    assert out.shape == (4, 2, 3)
    hidden = torch.relu(made.up(x[0, 0])).view(4, 64)
    said = torch.stack([torch.relu(hidden[e] @ made.down[e]) for e in range(4)])
    gates = torch.softmax(made.gates(x[0, 0]).view(3, 4), -1)
    by_hand = torch.stack([(gates[t] @ said) @ made.towers[t] + made.bias[t] for t in range(3)])
    assert torch.allclose(out[0, 0], by_hand, atol=1e-6)


def test_histories_are_blanked_whole_and_in_training_alone() -> None:
    torch.manual_seed(0)
    found = torch.ones(400, 3, 5)
    kept = blank(found, 0.25, training=True).flatten(1)
    assert ((kept == 0).all(1) | (kept == 1).all(1)).all() and 0.15 < (kept == 0).float().mean() < 0.35
    assert torch.equal(blank(found, 0.25, training=False), found) and torch.equal(blank(found, 0.0, True), found)


def test_unknown_labels_do_not_count_in_the_loss() -> None:
    logits = torch.tensor([[[0.5, 2.0]], [[-1.0, 9.0]]])
    labels = torch.tensor([[[1.0, 0.0]], [[0.0, float("nan")]]])
    each = torch.nn.functional.binary_cross_entropy_with_logits
    expected = each(logits[:, 0, 0], labels[:, 0, 0]) + each(logits[:1, 0, 1], labels[:1, 0, 1])
    assert bce(logits, labels).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", KINDS)
def test_every_ranker_scores_candidates_one_by_one(kind: str) -> None:
    task = Task.make(rated(4, 20, 3, 2))
    torch.manual_seed(0)
    model = RankerModel(RankerConfig(kind, task.users, task.items, task.tasks, task.width, d=8, n=6, layers=2)).eval()
    logits, states = model(task.batch(np.array([0, 30, 50]), 6))
    assert logits.shape == (3, 1, 1) and torch.isfinite(logits).all() and states.shape[:2] == (3, 1)
    alone, _ = model(task.batch(np.array([30]), 6))
    assert torch.allclose(alone[0], logits[1], atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"kind": "gru"}, {"d": 7}, {"n": 0}, {"dropout": 1.0}, {"layers": 0}, {"top": -1}, {"blank": 1.0}]
)
def test_bad_sizes_are_refused(change: dict[str, object]) -> None:
    sizes: dict[str, object] = {"kind": "attention", "users": 2, "items": 2, "tasks": 1, "dense": 5} | change
    with pytest.raises(GenrecError):
        RankerConfig(**sizes)  # type: ignore[arg-type]
