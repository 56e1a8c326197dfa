"""What an item is, in words: its categories and, where there are some, short text fields such as brand or year.

Prompts show these words, fine-tuning targets are made of them, and the quality of an instruction is measured by them.
All of them are cleaned and bounded as untrusted text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from genrec.data.dataset import Catalog
from genrec.instructions.text import clean

LABEL_BYTES = 40
REPEATED = 2  # a field is one of attributes where its values stand for this many items each, on average


class Attributes:
    """The labels of a catalogue.

    kinds: categories of each row, broad to narrow, as written in the catalogue's path. values: field name -> one value
    per row, "" for none; fields whose values hardly repeat (names, descriptions) are left out.
    labels: kinds and values of each row together. rarity: log(N / items with the label), 0 for one that all items have.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.kinds = [tuple(_labels(path)) for path in catalog.categories]
        self.values: dict[str, list[str]] = {}
        for field in catalog.fields:
            values = [next(iter(_labels([str(v or "")])), "") for v in catalog.table[field].to_pylist()]
            filled = [v for v in values if v]
            if filled and REPEATED * len(set(filled)) <= len(filled):
                self.values[field] = values
        columns = list(self.values.values())
        self.labels = [
            tuple(dict.fromkeys((*kinds, *(c[row] for c in columns if c[row])))) for row, kinds in enumerate(self.kinds)
        ]
        counts = Counter(label for labels in self.labels for label in labels)
        self.rarity = {label: math.log(len(catalog) / n) for label, n in counts.items()}

    def describe(self, row: int) -> str:
        """The labels of one row for a prompt: "Drama, War; 1997", without those that every item has."""
        kinds = ", ".join(k for k in self.kinds[row] if self.rarity[k] > 0)
        return "; ".join(filter(None, [kinds, *(column[row] for column in self.values.values())]))


def _labels(texts: Iterable[str]) -> list[str]:
    """Cleaned, without commas and semicolons (which separate labels), each once, and only if it says something."""
    cleaned = (" ".join(clean(t, LABEL_BYTES).replace(",", " ").replace(";", " ").split()) for t in texts)
    return [label for label in dict.fromkeys(cleaned) if any(c.isalnum() for c in label)]
