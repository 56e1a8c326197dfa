"""Untrusted text on its way to the page: one line, bounded, escaped. Nothing else in `ui` escapes by hand."""

from __future__ import annotations

from html import escape

from genrec.tools.base import short_title

TITLE, SENTENCE, LINE, WORD = 140, 400, 90, 60  # characters of a title, a sentence, a category path, an identifier


def plain(value: object, limit: int = TITLE) -> str:
    """One printable line of at most `limit` characters, unescaped: for components that show text as text."""
    return short_title(str(value), limit)


def safe(value: object, limit: int = TITLE) -> str:
    """`plain`, escaped for HTML text and for quoted attributes."""
    return escape(plain(value, limit), quote=True)


def element(name: str, inner: str, css: str = "") -> str:
    """One element around HTML that is safe already."""
    return f'<{name} class="{css}">{inner}</{name}>' if css else f"<{name}>{inner}</{name}>"


def counted(n: int, word: str) -> str:
    """1 item, 2 items, 1,000 items."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"
