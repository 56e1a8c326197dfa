"""How good instructions are as text, apart from what a generator makes of them.

Six figures, each of one instruction and so with an interval over users:

- *Valid*: the model's first reply follows the schema (genrec.instructions.parse), before any retry or replacement.
- *Intent hit*: look_for, embedded, retrieves the k nearest items of the catalogue that the user has not had. The hit
  is the mean likeness of those items to the item the user really chose next; likeness of two items is the rarity-
  weighted Jaccard index of their labels (categories, brand, year), 0 to 1. Two controls stand beside it: the history's
  own embedding in place of look_for, and the look_for of another user, in a ring drawn once. A text that is not better
  than another user's knows nothing of this user.
  The hit is also measured with the values of fields (year, brand) cut out of look_for: a text that names one is nearer
  to the items that have it, whoever wrote it.
- *Named*: the share of the next item's labels, weighted by rarity, that look_for names as words. No embedding.
- *Grounded*: the share of the instruction's content words that stand in what the model was shown of this user (the
  last turn of the prompt). Stop words, and digits' marks, do not count; a plural counts as its singular.
- *Distinct*: 1 where no other user has the same look_for, else 1 / how many have it.
- *Repeated*: the share of look_for's content words that it has said before ("comedy, comedy").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from genrec.contracts import Instruction, UserContext
from genrec.instructions.attributes import Attributes

RETRIEVED = 10  # items that a text retrieves
RECENT = 20  # newest items that stand for the history
FADE = 0.8  # weight of an item against the one after it

_WORD = re.compile(r"\w+(?:['’]\w+)?")
# What every sentence has, and what a description of a shopper has by its form ("someone who likes", "lately chose").
_FORM = """a an and any anything are as at back be by choose chose chosen customer for from get good has have i in into
is it item items kind kinds lately like likes look looking looks mostly more most my new next of on or other people
person shopper show similar some someone something such than that the their them these they thing things this to user
want wants was what which who will with you your"""
STOP = frozenset(_FORM.split())


def ring(users: int, seed: int = 0) -> np.ndarray:
    """int64 [users]: for each, another one; everyone's text is used once. Raises ValueError for fewer than two."""
    if users < 2:
        raise ValueError("texts of one user cannot be shuffled between users")
    order = np.random.default_rng(seed).permutation(users)
    other = np.empty(users, np.int64)
    other[order] = np.roll(order, -1)
    return other


def history_vectors(contexts: Sequence[UserContext], items: np.ndarray) -> np.ndarray:
    """float32 [B, D]: unit sums of the newest RECENT items' vectors, each FADE times the one after it; zeros for an
    empty history. items: unit vectors of the catalogue [N, D]."""
    out = np.zeros((len(contexts), items.shape[1]), np.float32)
    for i, context in enumerate(contexts):
        rows = context.history[: -RECENT - 1 : -1]
        if rows:
            out[i] = FADE ** np.arange(len(rows), dtype=np.float32) @ items[list(rows)]
    return _unit(out)


def likeness(a: Sequence[str], b: Sequence[str], attributes: Attributes) -> float:
    """The rarity-weighted Jaccard index of two sets of labels, 0 to 1; 0 where neither has a label that tells."""
    one, two = set(a), set(b)
    whole = sum(attributes.rarity[label] for label in one | two)
    return sum(attributes.rarity[label] for label in one & two) / whole if whole else 0.0


def intent_hits(
    queries: np.ndarray,
    contexts: Sequence[UserContext],
    wanted: np.ndarray,
    items: np.ndarray,
    attributes: Attributes,
    k: int = RETRIEVED,
) -> np.ndarray:
    """float64 [B], see *Intent hit*. queries: float [B, D]; wanted: the rows chosen next, int [B]; items: unit vectors
    of the catalogue [N, D]. Equal similarities: the lower row first. Items of the history are never retrieved."""
    out = np.zeros(len(contexts))
    for i, (query, context) in enumerate(zip(queries, contexts, strict=True)):
        scores = items @ query
        scores[list(context.history)] = -np.inf
        best = [row for row in np.argsort(-scores, kind="stable")[:k].tolist() if np.isfinite(scores[row])]
        labels = attributes.labels[int(wanted[i])]
        out[i] = np.mean([likeness(attributes.labels[row], labels, attributes) for row in best]) if best else 0.0
    return out


def without_values(text: str, attributes: Attributes) -> str:
    """look_for without those of its comma-separated parts that are the value of a field; all of it where all are."""
    values = {value for column in attributes.values.values() for value in column}
    kept = [part for part in text.split(", ") if part not in values]
    return ", ".join(kept) or text


def named(text: str, row: int, attributes: Attributes) -> float:
    """See *Named*: case and plurals do not count; 0 for an item without labels that tell."""
    said = f" {' '.join(_stems(text))} "
    labels = attributes.labels[row]
    whole = sum(attributes.rarity[label] for label in labels)
    found = sum(attributes.rarity[label] for label in labels if f" {' '.join(_stems(label))} " in said)
    return found / whole if whole else 0.0


def groundedness(instruction: Instruction, shown: str) -> float:
    """See *Grounded*. shown: the last turn of the prompt. 1 for an instruction without content words."""
    text = " ".join([instruction.situation, *instruction.intents, instruction.look_for])
    words = [stem for stem in _stems(text) if stem not in STOP and len(stem) > 1]
    there = set(_stems(shown))
    return sum(word in there for word in words) / len(words) if words else 1.0


def distinctness(texts: Sequence[str]) -> np.ndarray:
    """float64 [B], see *Distinct*: its sum is the number of different texts, its mean their share."""
    folded = [" ".join(_stems(text)) for text in texts]
    counts = Counter(folded)
    return np.array([1 / counts[text] for text in folded])


def repetition(text: str) -> float:
    """See *Repeated*; 0 for a text without content words."""
    words = [stem for stem in _stems(text) if stem not in STOP]
    return 1 - len(set(words)) / len(words) if words else 0.0


def _stems(text: str) -> list[str]:
    """Lower-case words, a plural s cut off longer ones."""
    words = (word.lower().removesuffix("'s") for word in _WORD.findall(text))
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") and w not in STOP else w for w in words]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9), np.float32)
