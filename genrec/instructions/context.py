"""What a language model is told about one user: UserContext + catalogue + evidence -> chat messages.

OxygenREC's slow thinking (1.4, task c, thin): the behaviour and the tools' sentences go in, situation, intents and
look_for come out. The paper's prompt text is not public; ours is in the top-level `prompts` package, which this
module does not import: a template is passed in. The kinds line is ours: categories of the history, each weighted
by recency and by its rarity in the catalogue, which grounds a small model better than a long list of titles.
The profile line and the time line serve the paper's task a, the query line its task b.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from genrec.contracts import Evidence, UserContext
from genrec.instructions.attributes import Attributes
from genrec.instructions.profile import profile_line, time_line
from genrec.instructions.store import QUERY_BYTES
from genrec.instructions.text import clean

if TYPE_CHECKING:
    from genrec.data.dataset import Catalog

Chat = list[dict[str, str]]

# What a template may ask for. history: titles alone; items: titles with their labels; evidence: the tools' sentences;
# proposals: what the first piece of evidence proposes, titles with their labels.
FIELDS = ("scenario", "time", "profile", "history", "items", "kinds", "trigger", "query", "evidence", "proposals")
RECENCY = 0.9  # a category's weight per step back in the history
TITLE_BYTES, SENTENCE_BYTES, KIND_BYTES = 80, 160, 40
PROFILE = "profile"  # the field of a prompt that shows attributes and statistics
LABELS_BYTES, PROFILE_BYTES = 80, 320  # the labels of one item; the profile line


class Template(Protocol):
    """What a prompt template offers; `prompts.PromptTemplate` is the one implementation."""

    @property
    def version(self) -> str: ...

    @property
    def schema(self) -> Mapping[str, Any]: ...

    @property
    def recent(self) -> int:
        """How many of the last history items the prompt shows."""
        ...

    @property
    def sentences(self) -> int:
        """How many of the tools' sentences the prompt shows."""
        ...

    @property
    def proposals(self) -> int:
        """How many of the tools' proposals the prompt shows."""
        ...

    @property
    def asks(self) -> frozenset[str]:
        """The names of FIELDS that the prompt shows."""
        ...

    def fill(self, values: Mapping[str, str]) -> Chat:
        """The chat with the values of FIELDS in place; lines whose values are all empty are left out."""
        ...


def context_hash(context: UserContext, catalog: Catalog, template: Template) -> str:
    """sha256 (hex) of everything an instruction is written from, evidence aside: another hash means stale.

    Prompt version, scenario, trigger, query, the history's item identifiers in order and the user's attributes, where
    there are any and the prompt shows them; a catalogue whose rows were reordered gives the same hash. Times, weights
    and the clock do not count.
    """
    parts = [
        template.version,
        context.scenario,
        None if context.trigger is None else catalog.item(context.trigger),
        context.query,
        [catalog.item(row) for row in context.history],
        *([context.attributes] if context.attributes and PROFILE in template.asks else []),
    ]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


def has_content(context: UserContext, template: Template) -> bool:
    """Whether the prompt would show anything to reason about; without it the generator's learned default serves
    better."""
    told = context.attributes and PROFILE in template.asks
    return bool(context.history or context.trigger is not None or context.query or told)


class PromptWriter:
    """Writes chats for one catalogue and one template."""

    def __init__(self, catalog: Catalog, template: Template) -> None:
        self.catalog = catalog
        self.template = template

    @cached_property
    def _rarity(self) -> dict[str, float]:
        counts = Counter(label for labels in self.catalog.categories for label in set(labels))
        return {label: math.log(1 + len(self.catalog) / n) for label, n in counts.items()}

    @cached_property
    def attributes(self) -> Attributes:
        """The labels of the catalogue."""
        return Attributes(self.catalog)

    def kinds(self, context: UserContext, n: int = 3) -> list[str]:
        """The n categories that tell most about the history (the trigger counts as newest), cleaned, best first."""
        score: dict[str, float] = {}
        weights = context.weights or (1.0,) * len(context.history)
        events = list(zip(context.history, weights, strict=True))
        events += [(context.trigger, 1.0)] if context.trigger is not None else []
        for age, (row, weight) in enumerate(reversed(events)):
            for label in set(self.catalog.categories[row]):
                score[label] = score.get(label, 0.0) + max(weight, 0.0) * RECENCY**age * self._rarity[label]
        best = [label for label, s in sorted(score.items(), key=lambda x: (-x[1], x[0])) if s > 0]
        cleaned = dict.fromkeys(clean(label, KIND_BYTES).replace(",", " ") for label in best)
        return [label for label in cleaned if any(c.isalnum() for c in label)][:n]

    def proposed(self, evidence: Sequence[Evidence]) -> list[int]:
        """The rows of the tools' proposals that the prompt shows, best first: those of the first piece of evidence."""
        return [int(row) for row in evidence[0].items[: self.template.proposals]] if evidence else []

    def chat(self, context: UserContext, evidence: Sequence[Evidence] = ()) -> Chat:
        """The chat for one context. evidence: what the tools say, most important first.

        Every title, label, query, attribute and sentence is cleaned and bounded, so the whole prompt is: at most
        80 x (template.recent + 1) + 160 x (template.sentences + template.proposals + 2) bytes, twice 80 for each of
        `recent` where titles come with their labels, and 320 for a profile, with some marks, beyond the template
        itself.
        """

        def quoted(text: str, limit: int) -> str:
            return f'"{clean(text, limit)}"'

        def described(row: int) -> str:
            labels = clean(self.attributes.describe(row), LABELS_BYTES)
            return quoted(self.catalog.title(row), TITLE_BYTES) + (f" ({labels})" if labels else "")

        asked = self.template.asks
        recent = context.history[-self.template.recent :] if self.template.recent else ()
        said = [piece.sentence for piece in evidence if piece.sentence]
        known = (clean(sentence, SENTENCE_BYTES) for sentence in said[: self.template.sentences])
        return self.template.fill(
            {
                "scenario": clean(context.scenario, KIND_BYTES),
                "time": time_line(context) if "time" in asked else "",
                "profile": clean(profile_line(context, self.attributes), PROFILE_BYTES) if PROFILE in asked else "",
                "history": "; ".join(quoted(self.catalog.title(row), TITLE_BYTES) for row in recent),
                "items": "; ".join(map(described, recent)) if "items" in asked else "",
                "kinds": ", ".join(self.kinds(context)),
                "trigger": "" if context.trigger is None else quoted(self.catalog.title(context.trigger), TITLE_BYTES),
                "query": quoted(context.query, QUERY_BYTES) if context.query else "",
                "evidence": " ".join(known),
                "proposals": "; ".join(map(described, self.proposed(evidence))) if "proposals" in asked else "",
            }
        )
