"""The whole trace of one request as HTML: instruction, request, evidence, beam, scores, time. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from genrec.contracts import Evidence, Instruction, Trace
from genrec.data.dataset import Catalog
from ui.rankers import Ranker, rankers
from ui.render import SOURCES, colour, context_line, part_names
from ui.text import SENTENCE, WORD, element, safe
from ui.tools import details

HISTORY = 30  # newest items shown


def trace_view(trace: Trace, catalog: Catalog, tools: Sequence[Ranker] = ()) -> str:
    """Everything that led to the list, in the order in which it happened, and what rankers say of it."""
    return (
        '<div class="head"><h2>How it came about</h2></div><div class="trace">'
        + _section("Instruction", instruction(trace), "wide")
        + _section("Request", request(trace, catalog))
        + _section("Beam of the generator", beam(trace, catalog))
        + _section("Tools", evidence(trace, catalog), "wide")
        + _section("Scores", scores(trace), "wide")
        + (_section("Rankers", rankers(tools, trace), "wide") if tools else "")
        + _section("Time", timings(trace), "wide")
        + "</div>"
    )


def _section(name: str, inner: str, css: str = "") -> str:
    return f'<section class="{css}"><h3>{name}</h3>{inner}</section>'


def instruction(trace: Trace) -> str:
    """What the generator was told, who wrote it and when."""
    meaning = SOURCES.get(trace.instruction_source, "")
    source = f'<span class="badge">{safe(trace.instruction_source, WORD)}</span> {meaning}'
    told = trace.instruction
    if told is None:
        return f'<p class="source">{source}</p>'
    facts = [("situation", safe(told.situation, SENTENCE))] if told.situation else []
    if told.intents:
        facts.append(("intents", "; ".join(safe(i, SENTENCE) for i in told.intents[:8])))
    if told.rationale:
        facts.append(("rationale", safe(told.rationale, SENTENCE)))
    written = provenance(told)
    if written:
        facts.append(("written", written))
    if trace.note:
        facts.append(("note", safe(trace.note, SENTENCE)))
    quote = f"<blockquote>{safe(told.look_for, SENTENCE)}</blockquote>"
    return f'<p class="source">{source}</p>{quote}{_facts(facts)}'


def provenance(told: Instruction) -> str:
    """Model, prompt version, time and context hash of an instruction, as far as they are known."""
    parts = [f"by {safe(told.model, WORD)}"] if told.model else []
    if told.created > 0:
        parts.append(_when(told.created))
    if told.prompt_version:
        parts.append(f"prompt <code>{safe(told.prompt_version, WORD)}</code>")
    if told.context_hash:
        parts.append(f"context <code>{safe(told.context_hash, 13)}</code>")
    return ", ".join(parts)


def _when(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):
        return "at an unreadable time"


def request(trace: Trace, catalog: Catalog) -> str:
    """What came in, and the history as it was used, newest first."""
    rows = trace.context.history
    newest = list(reversed(rows))[:HISTORY]
    lines = "".join(f'<li><span class="title">{safe(catalog.title(row))}</span></li>' for row in newest)
    rest = len(rows) - len(newest)
    more = f'<li class="more">and {rest:,} earlier</li>' if rest else ""
    kept = f'<ol class="kept">{lines}{more}</ol>' if rows else '<p class="label">An empty history.</p>'
    facts = [
        *context_line(trace.context, catalog),
        ("history", f"{len(rows):,} kept{', newest first' if rows else ''}"),
    ]
    return _facts(facts) + kept


def evidence(trace: Trace, catalog: Catalog) -> str:
    """One card per tool: its sentence, its items, and the rank of those that were recommended."""
    if not trace.evidence:
        return '<p class="label">This bundle has no tools.</p>'
    return element("div", "".join(_card(trace, e, catalog) for e in trace.evidence), "cards")


def _card(trace: Trace, e: Evidence, catalog: Catalog) -> str:
    rank = {r.row: i for i, r in enumerate(trace.recommended, 1)}
    weight = trace.weights.get(e.tool, 0.0)
    lines = "".join(
        f'<li><span class="title">{safe(catalog.title(int(row)))}</span>{_rank(rank.get(int(row)))}'
        f'<span class="num">{float(score):.3g}</span></li>'
        for row, score in zip(e.items, e.scores, strict=True)
    )
    fused = f"weight {weight:.3g}" if weight else "not fused"
    return (
        f'<article><h4><i class="swatch {colour(part_names(trace), e.tool)}"></i>{safe(e.tool, WORD)}'
        f"<small>{fused}</small></h4><p>{safe(e.sentence, SENTENCE)}</p><ol>{lines}</ol>{details(e)}</article>"
    )


def _rank(rank: int | None) -> str:
    return f'<span class="hit" title="recommended at rank {rank}">#{rank}</span>' if rank else ""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, at most `most` + 1 of them, a step of 1, 2 or 5 times a power of ten apart."""
    span = max(high - low, 1e-6)
    raw = span / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def beam(trace: Trace, catalog: Catalog) -> str:
    """The generator's own list on an axis of log-probability; filled dots were recommended."""
    if not trace.beam:
        return '<p class="label">The generator took no part.</p>'
    rank = {r.row: i for i, r in enumerate(trace.recommended, 1)}
    values = [p for _, p in trace.beam]
    low, high = min(values), max(values)
    margin = max(0.04 * (high - low), 0.05)
    low, high = low - margin, high + margin

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    axis = ticks(low, high)
    grid = "".join(f'<i class="grid" style="left:{at(t)}"></i>' for t in axis)
    labels = "".join(f'<span style="left:{at(t)}">{t:g}</span>' for t in axis)
    lines = "".join(
        f'<li><span class="title">{safe(catalog.title(row))}</span>{_rank(rank.get(row))}'
        f'<span class="track">{grid}<i class="dot{" in" if row in rank else ""}" style="left:{at(p)}"></i></span>'
        f'<span class="num">{p:.2f}</span></li>'
        for row, p in trace.beam
    )
    return (
        '<p class="label">Log-probability of each item, best first; a filled dot was recommended.</p>'
        f'<ol class="beam">{lines}<li class="axis" aria-hidden="true"><span class="track">{labels}</span></li></ol>'
    )


def scores(trace: Trace) -> str:
    """The numbers of the fusion: per recommended item what each part said, and its weight."""
    if not trace.recommended:
        return '<p class="label">Nothing was recommended.</p>'
    names = [n for n in part_names(trace) if any(n in r.parts for r in trace.recommended)]
    head = "".join(f"<th>{safe(n, WORD)}<small>× {trace.weights.get(n, 0.0):.3g}</small></th>" for n in names)
    body = "".join(
        f'<tr><td class="rank">{i}</td><td class="title"><span>{safe(r.title)}</span></td>'
        + "".join(f'<td class="num">{r.parts[n]:.2f}</td>' if n in r.parts else "<td></td>" for n in names)
        + f'<td class="num"><b>{r.score:.2f}</b></td></tr>'
        for i, r in enumerate(trace.recommended, 1)
    )
    return (
        '<p class="label">The generator speaks in log-probabilities, the tools in standard deviations over the '
        "catalogue, rankers over what stood in the choice; weight times score, summed, is the fused score.</p>"
        f'<div class="scroll"><table class="scores"><thead><tr><th>#</th><th class="title">Item</th>{head}'
        f"<th>fused</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def timings(trace: Trace) -> str:
    """Wall time per stage."""
    total = sum(trace.seconds.values())
    if total <= 0:
        return '<p class="label">No times were taken.</p>'
    lines = "".join(
        f'<li><span class="name">{safe(name, WORD)}</span><span class="bar"><i class="c0" '
        f'style="width:{100 * max(s, 0.0) / total:.2f}%"></i></span><span class="num">{1000 * s:.1f} ms</span></li>'
        for name, s in trace.seconds.items()
    )
    return f'<ul class="times">{lines}</ul><p class="label">{1000 * total:.1f} ms in all.</p>'


def _facts(facts: list[tuple[str, str]]) -> str:
    return element("dl", "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)) if facts else ""
