"""Untrusted text on its way to the page: one line, bounded, escaped. Nothing else in `ui` escapes by hand."""

from __future__ import annotations

from html import escape

from genrec.tools.base import short_title

TITLE, SENTENCE, WORD = 140, 400, 60  # characters of a title, of a sentence, of an identifier


def plain(value: object, limit: int = TITLE) -> str:
    """One printable line of at most `limit` characters, unescaped: for components that show text as text."""
    return short_title(str(value), limit)


def safe(value: object, limit: int = TITLE) -> str:
    """`plain`, escaped for HTML text and for quoted attributes."""
    return escape(plain(value, limit), quote=True)


def element(name: str, inner: str, css: str = "") -> str:
    """One element around HTML that is safe already."""
    return f'<{name} class="{css}">{inner}</{name}>' if css else f"<{name}>{inner}</{name}>"
