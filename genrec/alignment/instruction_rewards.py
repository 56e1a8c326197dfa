"""What an instruction of the slow thinker is worth to the fast one: plain functions over training positions.

The reward is a difference, so that it is not the answer in disguise: how much likelier the frozen generator finds the
item that the user really chose next with the instruction than with the default that it learned. What the generator
remembers of a training position is in both terms. All of this is ours: OxygenREC fine-tunes its thinker without
reinforcement learning.

Every function takes instructions [B], None for a reply that does not follow the schema, and returns float64 [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from genrec.contracts import Instruction, UserContext
from genrec.instructions import quality

if TYPE_CHECKING:
    from genrec.generator.model import GeneratorModel

NATS = 2.0  # of log-probability gained or lost that count as all there is to gain or lose
WORDS = 16  # a look_for of so many words is long enough


def valid(instructions: Sequence[Instruction | None]) -> np.ndarray:
    """1 for a reply that follows the schema."""
    return np.array([i is not None for i in instructions], float)


def grounded(instructions: Sequence[Instruction | None], shown: Sequence[str]) -> np.ndarray:
    """The share of content words that stand in what the model was shown (genrec.instructions.quality)."""
    return np.array(
        [0.0 if i is None else quality.groundedness(i, s) for i, s in zip(instructions, shown, strict=True)]
    )


def brief(instructions: Sequence[Instruction | None]) -> np.ndarray:
    """1 up to WORDS words of look_for, then falling to 0 at twice as many: length as such earns nothing."""
    words = np.array([2 * WORDS if i is None else len(i.look_for.split()) for i in instructions], float)
    return (2 - words / WORDS).clip(0, 1)


def helps(gain: np.ndarray, instructions: Sequence[Instruction | None]) -> np.ndarray:
    """-1 to 1: the gain of `log_probability_gain` over NATS; -1 for an invalid reply."""
    value = np.clip(np.nan_to_num(gain, nan=-NATS) / NATS, -1, 1)
    return np.where(valid(instructions) > 0, value, -1.0)


def near(likeness: np.ndarray, instructions: Sequence[Instruction | None]) -> np.ndarray:
    """0 to 1: the cosine of `target_likeness`; negative ones and invalid replies count 0."""
    return np.where(valid(instructions) > 0, np.nan_to_num(likeness).clip(0, 1), 0.0)


def log_probability_gain(
    model: GeneratorModel, contexts: Sequence[UserContext], targets: np.ndarray, vectors: np.ndarray
) -> np.ndarray:
    """log P(target | instruction) - log P(target | learned default), in nats. targets: rows [B]; vectors: embedded
    look_for, float [B, text_dim], NaN rows where there is none (their gain is 0)."""
    import torch

    from genrec.generator.search import make_history, make_request, score_items

    history = make_history(contexts, model.config.max_history).to(model.device)
    items = torch.from_numpy(np.asarray(targets, np.int64))[:, None].to(model.device)
    told, default = (
        score_items(model, history, make_request(model, contexts, given).to(model.device), items)[:, 0]
        for given in (vectors, None)
    )
    return (told - default).double().cpu().numpy()


def target_likeness(
    model: GeneratorModel, contexts: Sequence[UserContext], targets: np.ndarray, vectors: np.ndarray
) -> np.ndarray:
    """Cosine of an instruction and the target: q.t of the Q2I space where the model retrieves, else of their text
    embeddings. Shapes as in `log_probability_gain`; NaN rows give 0."""
    import torch
    import torch.nn.functional as F

    from genrec.generator.search import make_request

    rows = torch.from_numpy(np.asarray(targets, np.int64)).to(model.device)
    with torch.no_grad():
        if model.config.retrieved:
            request = make_request(model, contexts, vectors).to(model.device)
            found = (model.queries(request)[:, 0] * model.retrieval_items(rows)).sum(-1)
        else:
            given = torch.from_numpy(np.nan_to_num(vectors).astype(np.float32)).to(model.device)
            found = F.cosine_similarity(given, model.item_text[rows], dim=-1)
    return np.where(np.isnan(vectors).any(1), 0.0, found.double().cpu().numpy())
