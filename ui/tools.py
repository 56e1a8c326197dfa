"""How a tool came to its items, drawn: EBR's cluster shares, CAPTS' routes to channels. Pure functions."""

from __future__ import annotations

from typing import Any

from genrec.contracts import Evidence
from ui.render import COLOURS
from ui.text import WORD, counted, safe

CLUSTERS, TRIGGERS = 6, 6  # shown


def details(e: Evidence) -> str:
    """What `Evidence.details` holds, as HTML; nothing for a tool that tells none."""
    told = e.details or {}
    if told.get("clusters"):
        return clusters(told)
    return routes(told) if told.get("routes") else ""


def clusters(told: dict[str, Any]) -> str:
    """A bar per cluster, the likeliest first: its share of what comes next, and how many of the items it gives."""
    lines = "".join(
        f'<li><span class="name">{safe(c["label"], WORD)}</span><span class="bar"><i class="c0" '
        f'style="width:{100 * float(c["share"]):.2f}%"></i></span><span class="num">{float(c["share"]):.0%}, '
        f"{counted(int(c['items']), 'item')}</span></li>"
        for c in told["clusters"][:CLUSTERS]
    )
    return f'<p class="label">Clusters, alpha {float(told["alpha"]):.2g}</p><ul class="shares">{lines}</ul>'


def routes(told: dict[str, Any]) -> str:
    """A line per trigger, in the order in which they were asked, with the channels that it asks; a wider bar is a
    higher value."""
    names = list(told["channels"])
    asked: dict[int, list[dict[str, Any]]] = {}
    for one in told["routes"]:
        asked.setdefault(int(one["row"]), []).append(one)
    most = max((float(r["value"]) for r in told["routes"]), default=0.0) or 1.0
    legend = "".join(
        f'<li><i class="swatch c{i % COLOURS}"></i>{safe(name, WORD)}</li>' for i, name in enumerate(names)
    )
    lines = ""
    for found in list(asked.values())[:TRIGGERS]:
        bars = "".join(
            f'<i class="c{names.index(r["channel"]) % COLOURS}" style="width:'
            f'{100 * max(float(r["value"]), 0.02 * most) / most / max(1, len(names)):.2f}%" '
            f'title="{safe(r["channel"], WORD)} {float(r["value"]):.3f}"></i>'
            for r in found
        )
        said = ", ".join(safe(r["channel"], WORD) for r in found)
        lines += (
            f'<li><span class="name">{safe(found[0]["trigger"])}</span>'
            f'<span class="bar" role="img" aria-label="asks {said}">{bars}</span></li>'
        )
    rest = len(asked) - TRIGGERS
    more = f'<li class="more">and {rest} more triggers</li>' if rest > 0 else ""
    return (
        f'<p class="label">Triggers and the channels they ask, policy {safe(told["policy"], WORD)}</p>'
        f'<ul class="legend">{legend}</ul><ul class="shares">{lines}{more}</ul>'
    )
