"""Who the user is, in one line of a prompt: given attributes, else statistics of the history (OxygenREC 1.4, task a).

The paper's slow thinking reads "time, place, festival, weather, profile"; of these we know the time and the profile.
Statistics are counted over the whole history, which the prompt cannot list: favourite labels with their shares,
how much in how many days, and when. Clock times are UTC: a data set rarely says where its users live.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence

from genrec.contracts import MAX_ATTRIBUTES, UserContext
from genrec.instructions.attributes import LABEL_BYTES, Attributes
from genrec.instructions.text import clean

KINDS, VALUES = 5, 2  # most labels and field values that a line names
HABIT = 0.6  # a part of the day or week is a habit from this share of the events on
DAY = 86400
PARTS = ("night", "morning", "afternoon", "evening")  # six hours each, UTC


def profile_line(context: UserContext, attributes: Attributes) -> str:
    """Given attributes ("age 24, student"), then the history's statistics; "" where there is neither."""
    given = [
        " ".join(filter(None, (clean(name, LABEL_BYTES), clean(value, LABEL_BYTES))))
        for name, value in context.attributes[:MAX_ATTRIBUTES]
    ]
    return "; ".join(filter(None, [", ".join(filter(None, given)), *_statistics(context, attributes)]))


def time_line(context: UserContext) -> str:
    """The moment of the request, else of the newest event: "Saturday evening, December"; "" where neither is known.

    Without the part of the day where the moment is a whole day, as in data of day resolution.
    """
    moment = context.clock if context.clock is not None else next(reversed(context.times), None)
    if moment is None:
        return ""
    try:
        at = datetime.datetime.fromtimestamp(moment, datetime.UTC)
    except (OverflowError, OSError, ValueError):
        return ""
    part = f" {PARTS[at.hour // 6]}" if moment % DAY else ""
    return f"{_WEEKDAYS[at.weekday()]}{part}, {_MONTHS[at.month - 1]}"


_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def _statistics(context: UserContext, attributes: Attributes) -> list[str]:
    rows = context.history
    if not rows:
        return []
    kinds = Counter(kind for row in rows for kind in attributes.kinds[row] if attributes.rarity[kind] > 0)
    columns = [Counter(column[row] for row in rows if column[row]) for column in attributes.values.values()]
    days = len({int(t // DAY) for t in context.times})
    parts = [f"{len(rows)} chosen" + (f" in {days} days" if days > 1 else "")]
    if kinds:
        parts.append("mostly " + _shares(kinds, KINDS, len(rows)))
    for name, column in zip(attributes.values, columns, strict=True):
        if column:
            parts.append(f"{clean(name, LABEL_BYTES)} {_shares(column, VALUES, len(rows))}")
    return [*parts, *_habits(context.times)]


def _shares(counts: Counter[str], most: int, of: int) -> str:
    best = sorted(counts.items(), key=lambda x: (-x[1], x[0]))[:most]
    return ", ".join(f"{label} {100 * n / of:.0f}%" for label, n in best)


def _habits(times: Sequence[float]) -> list[str]:
    """ "evenings" or "weekends", where at least HABIT of the events fall there; hours only where the data has them."""
    found = []
    if any(t % DAY for t in times):
        part, n = Counter(int(t % DAY // (DAY // 4)) for t in times).most_common(1)[0]
        found += [f"{PARTS[part]}s"] if n >= HABIT * len(times) else []
    if times and sum((int(t // DAY) + 3) % 7 >= 5 for t in times) >= HABIT * len(times):  # 1 January 1970: a Thursday
        found.append("weekends")
    return found
