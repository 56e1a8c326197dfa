"""What a fine-tuned thinker should have said: a position's next items, described in the words of its context.

OxygenREC trains its small thinker on rationales of large models (1.4); none is at hand here, so the observed future is
the teacher, and how it is put into words is ours. Situation: what the user chose mostly and lately, from the history.
Intents and look_for: the labels of the next items, the nearest and the rarest first. Labels that the prompt does not
show are left out where others remain, because a model that is taught to name them learns to guess. Where the prompt
shows what the tools propose, look_for begins with titles out of those: what is chosen next first, then the best ones.
So it learns to repeat the tools, but for what this user is likelier to want.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from genrec.contracts import Instruction, UserContext
from genrec.data.dataset import Catalog
from genrec.instructions.attributes import Attributes
from genrec.instructions.text import clean

NEAR = 0.8  # weight of a next item against the one before it
TITLES, TITLE_BYTES = 3, 40  # proposals that look_for names, and how much of each title
KINDS = 3  # most kinds that look_for names; beside them it names the first value of each field (year, brand)


def target(
    context: UserContext,
    following: Sequence[int],
    prompt: str,
    attributes: Attributes,
    schema: Mapping[str, Any],
    titles: Sequence[str] = (),
) -> Instruction | None:
    """The instruction that would have been right, or None where the next items have no label.

    context: the request. following: the rows chosen next, nearest first. prompt: the text that the model sees (the
    last turn), for what it can know. schema: of the reply; its bounds hold. titles: as `titles_of` gives.
    Deterministic.
    """
    kinds, values = _weigh(following, attributes)
    kinds = ([kind for kind in kinds if _shown(kind, prompt)] or kinds)[:KINDS]
    chosen = kinds + [v for ranked in values for v in ranked[:1] if _shown(v, prompt)]
    if not chosen:
        return None
    bounds = schema["properties"]
    recent = {label for row in context.history[-KINDS:] for label in attributes.labels[row]}
    intents = [f"{'more' if label in recent else 'back to'} {label}" for label in kinds or chosen]
    look_for, most = "; ".join([*titles, chosen[0]]), bounds["look_for"]["maxLength"]
    for label in chosen[1:]:
        look_for += f", {label}" if len(f"{look_for}, {label}") < most else ""
    return Instruction(
        situation=_cut(_situation(context, attributes), bounds["situation"]),
        intents=tuple(_cut(i, bounds["intents"]["items"]) for i in intents[: bounds["intents"]["maxItems"]]),
        look_for=_cut(look_for, bounds["look_for"]),
    )


def titles_of(proposals: Sequence[int], following: Sequence[int], catalog: Catalog) -> list[str]:
    """The titles that look_for names: of these proposals those that are chosen next, in that order, then the best."""
    best = dict.fromkeys([row for row in following if row in set(proposals)] + list(proposals))
    named = dict.fromkeys(clean(catalog.title(row), TITLE_BYTES).replace(";", ",") for row in best)
    return [title for title in named if any(c.isalnum() for c in title)][:TITLES]


def _shown(label: str, prompt: str) -> bool:
    """Whether the label stands in the prompt as words of its own."""
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", prompt) is not None


def _weigh(following: Sequence[int], attributes: Attributes) -> tuple[list[str], list[list[str]]]:
    """Kinds and, per field, values of the next items, best first."""
    kinds: dict[str, float] = {}
    columns: list[dict[str, float]] = [{} for _ in attributes.values]
    for step, row in enumerate(following):
        for kind in attributes.kinds[row]:
            kinds[kind] = kinds.get(kind, 0.0) + NEAR**step * attributes.rarity[kind]
        for column, values in zip(columns, attributes.values.values(), strict=True):
            if values[row]:
                column[values[row]] = column.get(values[row], 0.0) + NEAR**step

    def ranked(scores: Mapping[str, float]) -> list[str]:
        return [label for label, score in sorted(scores.items(), key=lambda x: (-x[1], x[0])) if score > 0]

    return ranked(kinds), [ranked(column) for column in columns]


def _situation(context: UserContext, attributes: Attributes) -> str:
    """ "mostly Drama and Comedy, lately Thriller": the two most frequent kinds, and the newest item's rarest."""
    counts = Counter(k for row in context.history for k in attributes.kinds[row] if attributes.rarity[k] > 0)
    mostly = " and ".join(k for k, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0]))[:2])
    newest = attributes.kinds[context.history[-1]] if context.history else ()
    lately = max(newest, key=lambda k: attributes.rarity[k], default="")
    parts = [f"mostly {mostly}" if mostly else "", f"lately {lately}" if lately else ""]
    return ", ".join(filter(None, parts)) or "a shopper"


def _cut(text: str, schema: Mapping[str, Any]) -> str:
    return clean(text, schema["maxLength"] - 1) or "anything"  # a text at the bound reads as one that was cut
