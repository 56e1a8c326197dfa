"""What the ranking tools say of a list, drawn: MARM's past events, SARM's words. All text escaped.

A ranker was fitted on its own: items are matched by identifier, and what it does not know is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec.contracts import Trace
from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from ui.text import LINE, SENTENCE, WORD, safe

if TYPE_CHECKING:
    from genrec.tools.marm import MARM
    from genrec.tools.sarm import SARM


@dataclass(frozen=True)
class Ranker:
    """A ranking tool beside a catalogue. place: its own row of each catalogue row that it knows."""

    tool: MARM | SARM
    place: dict[int, int]

    @classmethod
    def open(cls, folder: Path, catalog: Catalog) -> Ranker:
        """Raises GenrecError for a folder that holds no ranker, or one that knows none of these items."""
        from genrec.tools.rankers import open_tool

        ranker = cls.beside(open_tool(folder), catalog)
        if not ranker.place:
            raise GenrecError(f"{folder} knows none of this bundle's items; fit it on the same data")
        return ranker

    @classmethod
    def beside(cls, tool: MARM | SARM, catalog: Catalog) -> Ranker:
        own = {item: row for row, item in enumerate(tool.profile.items)}
        return cls(tool, {row: own[item] for row, item in enumerate(catalog.items) if item in own})

    def reasons(self, trace: Trace) -> list[dict[str, Any]]:
        """Its order of the recommended items, best first, as `genrec.tools.rankers.reasons` gives them."""
        from genrec.tools.rankers import reasons

        history = tuple(self.place[row] for row in trace.context.history if row in self.place)
        whole = len(history) == len(trace.context.history)
        context = replace(trace.context, history=history, times=(), weights=(), trigger=None)
        context = context if whole else replace(context, user=None)
        rows = [self.place[r.row] for r in trace.recommended if r.row in self.place]
        return reasons(self.tool, context, rows) if rows else []


def rankers(tools: Sequence[Ranker], trace: Trace) -> str:
    """A list for each ranker: its order, its probability, and what carried it."""
    return "".join(_one(ranker, trace) for ranker in tools)


def _one(ranker: Ranker, trace: Trace) -> str:
    profile = ranker.tool.profile
    here = {r.item: rank for rank, r in enumerate(trace.recommended, 1)}
    lines = "".join(
        f'<li><span class="name">{safe(one["title"])}</span><span class="bar" role="img" '
        f'aria-label="{safe(one["sentence"], SENTENCE)}"><i class="c0" style="width:{100 * one["score"]:.2f}%"></i>'
        f'</span><span class="num">{one["score"]:.0%}, here {here[one["item"]]}</span>'
        f'<span class="because">{_because(one)}</span></li>'
        for one in ranker.reasons(trace)
    )
    name = f"{ranker.tool.name.upper()}: the chance of {profile.names[0]}"
    body = f'<ul class="shares ranker">{lines}</ul>' if lines else '<p class="source">It knows none of these items.</p>'
    return f'<p class="label">{safe(name, WORD)}</p>{body}'


def _because(one: dict[str, Any]) -> str:
    """The past events with their share of the attention, or the words with what each adds to the log-odds."""
    if "events" in one:
        parts = [f"{safe(e['title'])} {e['share']:.0%}" for e in one["events"]]
        return "looked at " + ", ".join(parts) if parts else "no history to look at"
    parts = [f"{safe(w['word'], WORD)} {w['worth']:+.2f}" for w in one["words"]]
    return "read " + ", ".join(parts) if parts else f"read nothing in {safe(one['anchor'], LINE)}"
