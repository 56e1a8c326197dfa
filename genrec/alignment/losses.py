"""Policy losses as pure functions of (new log-probabilities, old ones, advantages, mask): SA-GCPO and its peers.

new, old: float [B, T], log pi of every token (for the generator: of every code, T = 3) under the policy that is trained
and under the one that made the completions; advantages: float [B] or [B, T]; mask: bool [B, T], True for real tokens.
Each returns a scalar to be minimised, with gradients into `new` alone. With r = pi / pi_old, A the advantage, the last
column is the factor w of w A grad log pi, which the tests check by autograd:

| loss    | per token or sequence                      | w, A > 0                   | w, A < 0                     |
|---------|--------------------------------------------|----------------------------|------------------------------|
| GRPO    | min(r A, clip(r, 1 - e, 1 + e) A)          | r where r <= 1 + e         | r where r >= 1 - e           |
| DAPO    | GRPO with e_high above, mean over tokens   | r where r <= 1 + e_high    | r where r >= 1 - e           |
| GSPO    | GRPO of s = the geometric mean of r        | s where s <= 1 + e         | s where s >= 1 - e           |
| CISPO   | sg(min(r, c)) A log pi, mean over tokens   | min(r, c)                  | min(r, c)                    |
| ECPO    | GRPO of an r' that is held below 1 + e + d | as GRPO                    | min(r, 1 + e + d), r >= 1-e  |
| GBPO    | r' A without a clip; see `gbpo`            | min(r, 1)                  | pi / max(pi_old, 1 - pi)     |
| SAPO    | sigmoid(tau (r - 1)) 4 / tau A             | r sech^2(tau+ (r - 1) / 2) | r sech^2(tau- (r - 1) / 2)   |
| SA-GCPO | SAPO of advantages after the target floor  | as SAPO                    | as SAPO                      |

Sources: OxygenREC (2512.22386) Eq. 4-9 for SA-GCPO; SAPO 2511.20347; GRPO, DAPO, GSPO, CISPO as TRL 1.16 has them (the
tests run TRL's own code); ECPO from the OneRec report, GBPO from the OneRec-V2 report (2508.20900), both as formulas
quoted in secondary sources: that ECPO and GBPO look at whole sequences (the papers write o_i) is our reading.
Their log pi is a sum over tokens where the others' is a mean, so their gradients would be |y| times as large: ours
divides both losses by |y|, and every loss above has the gradient of the mean log pi at r = 1 (GBPO where A > 0). w is
then that of w A grad (1 / |y|) sum_t log pi_t.
No loss has a KL term: neither transcription of SA-GCPO has one, and TRL's default is none.

Ours: log-ratios are held within +-LIMIT, so that no exponential overflows; a token whose advantage is not finite is
left out; a sequence without a token does not count in the mean; without any token the loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LIMIT = 20.0  # of log-ratios: e^20 is beyond anything that is trained on
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def gate(ratio: Tensor, temperature: Tensor | float) -> Tensor:
    """f of SAPO and SA-GCPO: sigmoid(tau (r - 1)) 4 / tau. Its slope in r is `gate_weight`; at r = 1 the slope is 1."""
    return torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature


def gate_weight(ratio: Tensor, temperature: Tensor | float) -> Tensor:
    """4 p (1 - p) with p = sigmoid(tau (r - 1)), which is sech^2(tau (r - 1) / 2): how far the gate is open, 0 to 1."""
    p = torch.sigmoid(temperature * (ratio - 1))
    return 4 * p * (1 - p)


def log_ratios(new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """log r of every token, [B, T]; 0 where masked, whatever stands there."""
    return torch.where(mask, new - old, 0.0).clamp(-LIMIT, LIMIT)


def _ready(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log r [B, T], advantages [B, T], mask [B, T]) with what cannot be used masked out."""
    if new.shape != old.shape or new.shape != mask.shape or len(advantages) != len(new):
        raise ValueError(
            f"shapes differ: new {tuple(new.shape)}, old {tuple(old.shape)}, advantages {tuple(advantages.shape)}, "
            f"mask {tuple(mask.shape)}"
        )
    advantages = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(new)
    mask = mask.bool() & torch.isfinite(advantages)
    return log_ratios(new, old, mask), torch.where(mask, advantages, 0.0), mask


def _sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """1/G sum_i 1/|y_i| sum_t: the mean of each sequence's tokens, then of the sequences that have one."""
    tokens = mask.sum(1)
    return ((values * mask).sum(1) / tokens.clamp(min=1)).sum() / (tokens > 0).sum().clamp(min=1)


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """1 / sum_i |y_i| sum_i sum_t."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _whole(advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One advantage and one mask per sequence, [B, 1]: the mean over its tokens, and whether it has one."""
    tokens = mask.sum(1, keepdim=True)
    return (advantages * mask).sum(1, keepdim=True) / tokens.clamp(min=1), tokens > 0


def _length(mask: Tensor) -> Tensor:
    """|y|, int [B, 1]; 1 for a sequence without a token."""
    return mask.sum(1, keepdim=True).clamp(min=1)


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def grpo(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """- mean_i mean_t min(r A, clip(r, 1 - clip, 1 + clip) A): Shao et al. 2024, without its KL term."""
    log_r, advantages, mask = _ready(new, old, advantages, mask)
    return -_sequence_mean(_clipped(log_r.exp(), advantages, clip, clip), mask)


def dapo(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, clip_high: float = 0.28
) -> Tensor:
    """GRPO with a higher upper clip and one mean over all tokens. That groups of equal rewards are dropped comes by
    itself: their advantages are 0."""
    log_r, advantages, mask = _ready(new, old, advantages, mask)
    return -_token_mean(_clipped(log_r.exp(), advantages, clip, clip_high), mask)


def gspo(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """GRPO of the sequence ratio s = exp(mean_t log r). clip: the paper's 3e-4 is for long texts; that of three codes
    moves as one token does, so the default is GRPO's (ours)."""
    log_r, advantages, mask = _ready(new, old, advantages, mask)
    whole, present = _whole(advantages, mask)
    s = (log_r.sum(1, keepdim=True) / _length(mask)).exp()
    return -_sequence_mean(_clipped(s, whole, clip, clip), present)


def cispo(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, most: float = 5.0) -> Tensor:
    """- mean over tokens of sg(min(r, most)) A log pi (MiniMax 2025; TRL's form, bounded from above only)."""
    log_r, advantages, mask = _ready(new, old, advantages, mask)
    ratio = log_r.exp().clamp(max=most).detach()
    return -_token_mean(ratio * advantages * torch.where(mask, new, 0.0), mask)


def ecpo(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, delta: float = 0.1) -> Tensor:
    """Early-clipped GRPO (OneRec): pi_old becomes max(sg(pi) / (1 + clip + delta), pi_old), of whole sequences;
    divided by their length.

    The ratio never exceeds 1 + clip + delta, which matters where A < 0: there GRPO's weight grows with r.
    """
    log_r, advantages, mask = _ready(new, old, advantages, mask)
    whole, present = _whole(advantages, mask)
    r = log_r.sum(1, keepdim=True).clamp(-LIMIT, LIMIT).exp()
    scale = (1 + clip + delta) / r.detach()
    return -_sequence_mean(_clipped(r * scale.clamp(max=1), whole, clip, clip) / _length(mask), present)


def gbpo(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Gradient-bounded policy optimisation (OneRec-V2): r' A without a clip, of whole sequences and divided by their
    length, where pi_old becomes

        max(pi_old, sg(pi)) for A >= 0        max(pi_old, 1 - sg(pi)) for A < 0

    so the gradient is never larger than that of binary cross-entropy; an unlikely item is hardly pushed down further.
    The paper writes a minus before the objective; it is taken as the loss's.
    """
    log_r, advantages, mask = _ready(new, old, advantages, mask)
    whole, present = _whole(advantages, mask)
    log_pi = torch.where(mask, new, 0.0).sum(1, keepdim=True)
    before = (log_pi - log_r.sum(1, keepdim=True)).detach().exp()
    pi = log_pi.detach().exp()
    bound = torch.maximum(before, torch.where(whole >= 0, pi, 1 - pi))
    return -_sequence_mean(log_pi.exp() / bound.clamp(min=1e-30) * whole / _length(mask), present)


def sapo(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, positive: float = 1.0, negative: float = 1.05
) -> Tensor:
    """- mean_i mean_t gate(r, tau) A; tau is `positive` where A > 0, else `negative`. The defaults are the paper's."""
    log_r, advantages, mask = _ready(new, old, advantages, mask)
    temperature = torch.where(advantages > 0, advantages.new_tensor(positive), advantages.new_tensor(negative))
    return -_sequence_mean(gate(log_r.exp(), temperature) * advantages, mask)


def sa_gcpo(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, positive: float = 2.0, negative: float = 1.0
) -> Tensor:
    """Eq. 4-9 of OxygenREC: SAPO's gate on advantages that went through the target floor
    (`genrec.alignment.advantages.suppressed`), which is all that differs.

    positive, negative: tau+ and tau-. The sources contradict each other on their order (one says that tau+ > tau- is
    steadier, SAPO recommends the opposite). The defaults are one of the two orders: on ML-100K validation no order and
    no pair is told apart from another (docs/alignment.md; tests/benchmarks/compare_alignment.py sweeps them).
    """
    return sapo(new, old, advantages, mask, positive, negative)


LOSSES: dict[str, Loss] = {
    "sa-gcpo": sa_gcpo,
    "sapo": sapo,
    "grpo": grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "ecpo": ecpo,
    "gbpo": gbpo,
}
