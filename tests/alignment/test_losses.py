"""The losses: gradient weights in closed form, TRL's own values, bounded and unbounded ratios, and what is missing."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from genrec.alignment.losses import LOSSES, ecpo, gate, gate_weight, gspo, sa_gcpo, sapo

RATIOS = (0.2, 0.5, 0.79, 1.0, 1.19, 1.25, 1.5, 2.0, 3.0, 5.0)


def weight(name: str, ratio: float, advantage: float, old: float = -1.0, **settings: float) -> float:
    """w of the gradient w A grad log pi at one token, by autograd."""
    new = torch.tensor([[old + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](new, torch.tensor([[old]], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64),
                        torch.ones(1, 1, dtype=torch.bool), **settings)  # fmt: skip
    loss.backward()
    return -float(new.grad) / advantage


def sech2(x: float) -> float:
    return 1 / math.cosh(x) ** 2


def closed_form(name: str, r: float, positive: bool, old: float) -> float:
    """The table of the module's first lines."""
    pi, before = r * math.exp(old), math.exp(old)
    if name in ("grpo", "gspo"):
        return r if (r <= 1.2 if positive else r >= 0.8) else 0.0
    if name == "dapo":
        return r if (r <= 1.28 if positive else r >= 0.8) else 0.0
    if name == "cispo":
        return min(r, 5.0)
    if name == "ecpo":
        return (r if r <= 1.2 else 0.0) if positive else (min(r, 1.3) if r >= 0.8 else 0.0)
    if name == "gbpo":
        return min(r, 1.0) if positive else pi / max(before, 1 - pi)
    tau = {"sapo": (1.0, 1.05), "sa-gcpo": (2.0, 1.0)}[name][0 if positive else 1]
    return r * sech2(tau * (r - 1) / 2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_gradient_weights_are_those_of_the_table(name: str, advantage: float) -> None:
    for r in RATIOS:
        old = -2.5  # pi stays below 1 at every ratio
        assert weight(name, r, advantage, old) == pytest.approx(closed_form(name, r, advantage > 0, old), abs=1e-9), r


def test_stated_values_of_the_gate() -> None:
    """The figures of the notes: w without r at r = 0.5, 1.5, 2, 3."""
    stated = {1.0: (0.940, 0.940, 0.786, 0.420), 1.05: (0.934, 0.934, 0.768, 0.389), 2.0: (0.786, 0.786, 0.420, 0.071),
              5.0: (0.280, 0.280, 0.027, 0.000)}  # fmt: skip
    r = torch.tensor([0.5, 1.5, 2.0, 3.0], dtype=torch.float64)
    for tau, values in stated.items():
        assert gate_weight(r, tau).tolist() == pytest.approx(values, abs=1e-3)
        assert gate(torch.ones(1), tau).item() == pytest.approx(2 / tau)


def test_on_policy_every_gate_is_plain_policy_gradient() -> None:
    for name in set(LOSSES) - {"gbpo"}:
        assert weight(name, 1.0, 1.0) == pytest.approx(1.0) == weight(name, 1.0, -1.0), name


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_on_policy_all_losses_have_gradients_of_one_size_at_any_length(tokens: int) -> None:
    """A / (B T) at every token, so that one learning rate serves them all."""
    old = torch.full((2, tokens), -1.5, dtype=torch.float64)
    for name in LOSSES:
        new = old.clone().requires_grad_()
        advantages = torch.tensor([1.0, 0.5], dtype=torch.float64)
        LOSSES[name](new, old, advantages, torch.ones(2, tokens, dtype=torch.bool)).backward()
        expected = (-advantages / (2 * tokens))[:, None].expand(2, tokens)
        assert torch.allclose(new.grad, expected), name


@pytest.mark.parametrize(("name", "advantage", "w"), [("ecpo", 1.0, 1.1), ("ecpo", -1.0, 1.1), ("gbpo", 1.0, 1.0)])
def test_sequence_losses_see_the_ratio_of_the_whole_sequence(name: str, advantage: float, w: float) -> None:
    old = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
    new = (old + torch.tensor([0.5, -0.7, 0.2 + math.log(1.1)], dtype=torch.float64)).requires_grad_()
    LOSSES[name](new, old, torch.tensor([advantage]).double(), torch.ones(1, 3, dtype=torch.bool)).backward()
    assert (-new.grad * advantage * 3)[0].tolist() == pytest.approx([w] * 3)


def test_a_ratio_of_five_is_bounded_in_sa_gcpo_and_not_in_its_peers() -> None:
    far = {r: {name: weight(name, r, -1.0, -8.0) for name in LOSSES} for r in (5.0, 50.0)}
    assert far[5.0]["sa-gcpo"] == pytest.approx(5 * sech2(2.0)) and far[5.0]["sa-gcpo"] < 0.36
    assert far[50.0]["sa-gcpo"] < 1e-6  # the further off, the less it says
    for unbounded in ("grpo", "dapo", "gspo"):
        assert far[5.0][unbounded] == pytest.approx(5.0) and far[50.0][unbounded] == pytest.approx(50.0)
    for bounded in ("ecpo", "cispo", "gbpo"):
        assert far[50.0][bounded] <= 5.0
    # in the best case of all ratios, for both signs
    r = torch.logspace(-4, 4, 4001, dtype=torch.float64)
    assert (r * gate_weight(r, 1.0)).max() < 1.6


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    old = -torch.rand(6, 4, dtype=dtype) * 3
    new = (old + 0.4 * torch.randn(6, 4, dtype=dtype)).requires_grad_()
    mask = torch.arange(4) < torch.tensor([4, 4, 3, 2, 1, 4])[:, None]
    return new, old, torch.tensor([1.2, -0.7, 0.0, 2.0, -1.5, 0.3], dtype=dtype), mask


def of_trl(loss_type: str, level: str, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """What GRPOTrainer._compute_loss of the installed TRL returns for these numbers; everything around it is a stub."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    accelerator = SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x)
    arguments = SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
                                steps_per_generation=1, use_bias_correction_kl=False)  # fmt: skip
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0, use_vllm=False,
        importance_sampling_level=level, loss_type=loss_type, epsilon_low=0.2,
        epsilon_high={"dapo": 0.28, "cispo": 5.0}.get(loss_type, 0.2), args=arguments, accelerator=accelerator,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)}, get_off_policy_mask=None,
    )  # fmt: skip
    ids = torch.zeros(new.shape, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids, "completion_mask": mask.long(),
              "advantages": advantages, "old_per_token_logps": old, "num_items_in_batch": mask.sum()}  # fmt: skip
    return trainer._compute_loss(fake, None, inputs)


@pytest.mark.parametrize(
    ("name", "loss_type", "level"),
    [("grpo", "grpo", "token"), ("dapo", "dapo", "token"), ("cispo", "cispo", "token"), ("sapo", "sapo", "token"),
     ("gspo", "grpo", "sequence")],
)  # fmt: skip
def test_values_and_gradients_are_trls(name: str, loss_type: str, level: str) -> None:
    new, old, advantages, mask = example()
    ours = LOSSES[name](new, old, advantages, mask)
    theirs = of_trl(loss_type, level, new, old, advantages, mask)
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, new)[0] for x in (ours, theirs)), atol=1e-12)


def test_sa_gcpo_is_sapo_of_its_temperatures() -> None:
    new, old, advantages, mask = example()
    assert sa_gcpo(new, old, advantages, mask, 1.5, 3.0) == sapo(new, old, advantages, mask, 1.5, 3.0)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_and_unusable_advantages_count_nothing(name: str) -> None:
    new, old, advantages, mask = example()
    whole = LOSSES[name](new[:5], old[:5], advantages[:5], mask[:5])
    dirty_new, dirty_old = new.detach().clone(), old.clone()
    dirty_new[~mask], dirty_old[~mask] = torch.nan, torch.inf
    dirty_new.requires_grad_()
    spoiled = advantages.clone()
    spoiled[5] = torch.nan
    loss = LOSSES[name](dirty_new, dirty_old, spoiled, mask)
    assert torch.allclose(loss, whole)
    loss.backward()
    assert torch.isfinite(dirty_new.grad).all() and not dirty_new.grad[5].any() and not dirty_new.grad[~mask].any()


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_group_and_huge_ratios_give_finite_numbers(name: str) -> None:
    new = torch.zeros(2, 3, requires_grad=True)
    nothing = LOSSES[name](new, torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0 and not new.grad.any()
    for gap in (-1e4, 1e4):
        new = torch.full((2, 3), -1.0, requires_grad=True)
        LOSSES[name](new, new.detach() - gap, torch.tensor([1.0, -1.0]), torch.ones(2, 3, dtype=torch.bool)).backward()
        assert torch.isfinite(new.grad).all()


def test_advantages_per_token_are_taken_as_they_are() -> None:
    new, old, advantages, mask = example()
    assert torch.allclose(sapo(new, old, advantages, mask), sapo(new, old, advantages[:, None].expand(6, 4), mask))
    for loss in (gspo, ecpo):  # sequence losses take their mean
        assert torch.isfinite(loss(new, old, torch.rand(6, 4).double(), mask))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        sapo(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), torch.ones(2, 3, dtype=torch.bool))
