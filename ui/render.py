"""The list of recommendations, and the small pieces beside the controls, as HTML: pure functions, all text escaped.

The bar of an item shows what each part adds to its fused score: weight x standardised score, counted from the
lowest value of that part in this list. A constant per part changes no ranking, and without it the generator's
log-probabilities (all negative) and the tools' scores could not stand on one another.
"""

from __future__ import annotations

from collections.abc import Sequence

from genrec.candidates import GENERATOR
from genrec.contracts import Trace, UserContext
from genrec.data.dataset import Catalog, Dataset
from genrec.data.scenarios import SCENARIOS
from ui.session import Session
from ui.text import LINE, SENTENCE, WORD, counted, element, safe

SHOWN_HISTORY = 100  # newest items of a history that the page lists
COLOURS = 8  # classes c0 to c7 in style.css

SOURCES = {
    "given": "typed here",
    "query": "the search text",
    "rewritten": "what the search text means, written beforehand",
    "stored": "written beforehand for this user",
    "default": "no instruction: the model's learned default",
}


def part_names(trace: Trace) -> list[str]:
    """Every part that could speak, the generator first, then the tools in the bundle's order."""
    return [GENERATOR, *(e.tool for e in trace.evidence if e.tool != GENERATOR)]


def colour(parts: Sequence[str], name: str) -> str:
    """The CSS class of a part's colour; the same part has the same colour everywhere."""
    return f"c{parts.index(name) % COLOURS}" if name in parts else f"c{COLOURS - 1}"


def contributions(trace: Trace) -> list[dict[str, float]]:
    """Per recommended item what each fused part adds, from the lowest of this list: all >= 0, as part_names orders."""
    order = [name for name in part_names(trace) if any(name in r.parts for r in trace.recommended)]
    weighted = [{n: trace.weights.get(n, 0.0) * r.parts.get(n, 0.0) for n in order} for r in trace.recommended]
    lowest = {n: min(w[n] for w in weighted) for n in order} if weighted else {}
    return [{n: w[n] - lowest[n] for n in order} for w in weighted]


def recommendations(trace: Trace, catalog: Catalog) -> str:
    """The list itself: rank, title, category, semantic ID, and a stacked bar of the parts."""
    names, rows = part_names(trace), contributions(trace)
    count = len(trace.recommended)
    if not count:
        return error("Nothing to recommend: every item of the catalogue was seen before or is filtered out.")
    who = "" if trace.context.user is None else f" for user {safe(trace.context.user, WORD)}"
    line = f"{counted(count, 'item')}{who}, scenario {safe(trace.context.scenario, WORD)}, instruction {_source(trace)}"
    fused = [n for n in names if any(n in r.parts for r in trace.recommended)]
    legend = "".join(
        element(
            "li", f'<i class="swatch {colour(names, n)}"></i>{safe(n, WORD)} <b>{trace.weights.get(n, 0.0):.3g}</b>'
        )
        for n in fused
    )
    longest = max((sum(r.values()) for r in rows), default=0.0)
    body = "".join(
        '<tr class="rec">'
        f'<td class="rank">{rank}</td>'
        f'<td class="what"><span class="title" title="{safe(r.title, SENTENCE)}">{safe(r.title)}</span>'
        f'<span class="category">{category(catalog, r.row)}</span></td>'
        f'<td class="sid"><code>{semantic_id(r.semantic_id)}</code></td>'
        f'<td class="why"><div>{_bar(names, parts, longest)}<span class="score">{r.score:.2f}</span></div></td></tr>'
        for rank, (r, parts) in enumerate(zip(trace.recommended, rows, strict=True), 1)
    )
    return (
        f'<div class="head"><h2>Recommendations</h2><p class="line">{line}</p></div>'
        f'<ul class="legend" aria-label="Parts and their fusion weights">{legend}</ul>'
        '<table class="recs"><thead><tr><th class="rank">#</th><th class="what">Item</th><th class="sid">Semantic ID'
        f'</th><th class="why">What put it here</th></tr></thead><tbody>{body}</tbody></table>'
        '<p class="note">Each bar adds up what the parts give, weight times score, counted from the lowest item of '
        "this list; the number is the fused score.</p>"
    )


def _source(trace: Trace) -> str:
    return f'<span class="badge">{safe(trace.instruction_source, WORD)}</span>'


def _bar(names: Sequence[str], parts: dict[str, float], longest: float) -> str:
    """A stacked bar, as long as its share of the longest one. parts: contributions >= 0."""
    told = ", ".join(f"{safe(n, WORD)} +{v:.2f}" for n, v in parts.items())
    segments = "".join(
        f'<i class="{colour(names, n)}" style="width:{100 * v / longest:.2f}%" title="{safe(n, WORD)} +{v:.2f}"></i>'
        for n, v in parts.items()
        if longest > 0 and v / longest >= 0.0005
    )
    return f'<span class="bar" role="img" aria-label="{told}">{segments}</span>'


def category(catalog: Catalog, row: int) -> str:
    """The category path as one safe line."""
    return safe(" · ".join(catalog.categories[row][:6]), LINE)


def semantic_id(codes: Sequence[int]) -> str:
    """Codes with dots between them."""
    return "·".join(str(int(code)) for code in codes)


def error(message: str) -> str:
    """One clear line about what went wrong."""
    return f'<p class="error" role="alert">{safe(message, SENTENCE)}</p>'


def header(dataset: Dataset) -> str:
    """Name of the page, and what data it stands on."""
    s = dataset.sequences
    sizes = (len(dataset.catalog), "item"), (len(s), "user"), (s.events, "event")
    facts = ", ".join(counted(n, word) for n, word in sizes)
    return (
        '<div class="top"><h1>genrec</h1><p>A slow thinker writes instructions, a fast one generates items.</p>'
        f'<p class="data"><b>{safe(dataset.name, WORD)}</b> {facts}</p></div>'
    )


def history_list(session: Session, catalog: Catalog) -> str:
    """The chosen history, newest first, each item with a button that removes it."""
    rows = session.history
    if session.user is None:
        whose = "Your own history" if rows else "No history yet: choose a user, or add items by title"
    elif session.edited:
        whose = f"Edited from user {safe(session.user, WORD)}: a history of your own now"
    else:
        whose = f"History of user {safe(session.user, WORD)}"
    count = f", {counted(len(rows), 'item')}, newest first" if rows else ""
    shown = range(len(rows) - 1, max(-1, len(rows) - 1 - SHOWN_HISTORY), -1)
    lines = "".join(
        f'<li><span class="n">{i + 1}</span><span class="title">{safe(catalog.title(rows[i]))}</span>'
        f'<button type="button" data-position="{i}" data-row="{rows[i]}" '
        f'aria-label="Remove {safe(catalog.title(rows[i]))}">×</button></li>'
        for i in shown
    )
    rest = len(rows) - len(shown)
    more = f'<li class="more">and {rest:,} earlier</li>' if rest else ""
    return f'<p class="label">{whose}{count}</p>' + (f'<ol class="history">{lines}{more}</ol>' if rows else "")


def matches(rows: Sequence[int], typed: str, catalog: Catalog) -> str:
    """Items whose titles match what is typed, each a button that adds it."""
    if not typed.strip():
        return ""
    if not rows:
        return f'<p class="label">No title has “{safe(typed, WORD)}”</p>'
    lines = "".join(
        f'<li><button type="button" data-row="{row}"><span class="title">{safe(catalog.title(row))}</span>'
        f'<span class="category">{category(catalog, row)}</span></button></li>'
        for row in rows
    )
    return f'<ul class="matches">{lines}</ul>'


def told(source: str, situation: str = "") -> str:
    """One line under the instruction box: what the next request will follow. source: see ui.session.source."""
    about = f' <span class="about">{safe(situation, SENTENCE)}</span>' if situation else ""
    return f'<p class="label"><span class="badge">{safe(source, WORD)}</span> {SOURCES[source]}{about}</p>'


def scenario_line(name: str) -> str:
    """What the scenario means, in one sentence."""
    description = SCENARIOS[name].description if name in SCENARIOS else ""
    return f'<p class="label">{safe(description, SENTENCE)}</p>'


def context_line(context: UserContext, catalog: Catalog) -> list[tuple[str, str]]:
    """(name, safe HTML) of what a request holds besides its history."""
    out = [("scenario", safe(context.scenario, WORD))]
    if context.user is not None:
        out.insert(0, ("user", safe(context.user, WORD)))
    if context.attributes:
        out.append(("profile", safe(", ".join(f"{name} {value}" for name, value in context.attributes), SENTENCE)))
    if context.trigger is not None:
        out.append(("trigger", safe(catalog.title(context.trigger))))
    if context.query:
        out.append(("query", safe(context.query, SENTENCE)))
    return out
