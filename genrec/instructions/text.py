"""Untrusted text made safe for a prompt: item titles, queries and tools' sentences come from strangers.

Nothing that comes out can end the quotation it stands in, open a chat turn, or break a line. What it says in
plain words stays: it is delimited and bounded, and the reply is held to a schema (see schema.py).
"""

from __future__ import annotations

import re
import unicodedata

# Whole markers of chat templates, removed together with what they name: <|im_start|>, </s>, [INST], <<SYS>>,
# <start_of_turn>. What resembles a marker and is not known here loses its brackets below.
_MARKERS = re.compile(
    r"<\|[^<>]{0,40}\|>|</?(?:s|bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_(?:turn|text)>", re.I
)
_MARKS = str.maketrans({"<": "(", ">": ")", "{": "(", "}": ")", "[": "(", "]": ")", "|": "/", '"': "'", "`": "'"})


def clean(text: str, limit: int) -> str:
    """One line of at most `limit` UTF-8 bytes without control characters, chat markers, brackets or double quotes.

    The bound is in bytes because a byte-level tokenizer makes at most one token of each byte. Longer text is cut
    between characters, at the last space where its second half has one. Cleaning twice changes nothing.
    """
    text = unicodedata.normalize("NFKC", text[: 8 * limit])  # full-width brackets become plain ones here
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = " ".join(_MARKERS.sub(" ", text).translate(_MARKS).split())
    if len(text.encode()) <= limit:
        return text
    cut = text.encode()[:limit].decode(errors="ignore")
    space = cut.rfind(" ")
    return (cut[:space] if space > limit // 2 else cut).rstrip()
