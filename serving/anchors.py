"""The batch job that writes SARM's semantic anchors: items in, stored anchors out; kill it and start it again.

Items are taken in chunks in the order of the catalogue; each chunk is generated whole and appended to the store at
once. What has an anchor of the same text and prompt is passed over. A reply that breaks the schema is asked for once
more and then replaced by the template's anchor, marked as such; so is one whose prompt does not fit the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.instructions.context import Chat, Template
from genrec.tools.sarm.anchors import (
    TEMPLATE,
    Anchor,
    AnchorStore,
    item_values,
    parse_anchor,
    source_hash,
    template_anchor,
)
from serving.llm import Backend, PromptTooLong

logger = logging.getLogger(__name__)

MAX_TOKENS = 140  # six fields at the schema's bounds
REMINDER = "\nAnswer with the JSON object alone, six short fields."


@dataclass(frozen=True)
class AnchorReport:
    """What a run did: asked = current + written. retried: replies that broke the schema; replaced: by the template."""

    asked: int
    current: int = 0
    written: int = 0
    retried: int = 0
    replaced: int = 0

    def line(self) -> str:
        return (
            f"anchors: {self.current + self.written:,} of {self.asked:,} items, {self.written:,} written, "
            f"{self.current:,} up to date, {self.retried:,} asked again, {self.replaced:,} replaced by the template"
        )


def stale_rows(catalog: Catalog, template: Template, stored: dict[str, Anchor], rows: Sequence[int]) -> list[int]:
    """The rows without an anchor of their text and this prompt. A template's anchor in a model's store stays: it was
    tried."""
    hashes = {row: source_hash(catalog, row, template.version) for row in rows}
    return [row for row in rows if getattr(stored.get(catalog.item(row)), "source", None) != hashes[row]]


def write_anchors(
    catalog: Catalog,
    open_engine: Callable[[], Backend],
    template: Template,
    store: AnchorStore,
    rows: Sequence[int] | None = None,
    chunk: int = 64,
    report: Callable[[str], None] = logger.info,
) -> AnchorReport:
    """Writes an anchor for every row (None: all) that needs one. The model starts only if one does."""
    if chunk < 1:
        raise GenrecError(f"chunk is {chunk}; it must be at least 1")
    rows = range(len(catalog)) if rows is None else rows
    todo = stale_rows(catalog, template, store.all(), rows)
    current, written, retried, replaced = len(rows) - len(todo), 0, 0, 0
    if not todo:
        return AnchorReport(len(rows), current)
    store.append(())  # say so before the model starts, where it cannot be written
    engine = open_engine()
    try:
        for start in range(0, len(todo), chunk):
            part = todo[start : start + chunk]
            chats = [template.fill(item_values(catalog, row)) for row in part]
            found = _ask(engine, chats, template, catalog, part, MAX_TOKENS)
            again = [i for i, anchor in enumerate(found) if anchor is None]
            if again:
                more = [
                    [*chats[i][:-1], {**chats[i][-1], "content": chats[i][-1]["content"] + REMINDER}] for i in again
                ]
                second = _ask(engine, more, template, catalog, [part[i] for i in again], 2 * MAX_TOKENS)
                for i, anchor in zip(again, second, strict=True):
                    found[i] = anchor
            done = [anchor or _fallback(catalog, row, template) for row, anchor in zip(part, found, strict=True)]
            store.append((catalog.item(row), anchor) for row, anchor in zip(part, done, strict=True))
            written, retried = written + len(part), retried + len(again)
            replaced += sum(anchor.model == TEMPLATE for anchor in done)
            report(AnchorReport(len(rows), current, written, retried, replaced).line())
    finally:
        engine.close()
    return AnchorReport(len(rows), current, written, retried, replaced)


def _ask(
    engine: Backend, chats: list[Chat], template: Template, catalog: Catalog, rows: Sequence[int], tokens: int
) -> list[Anchor | None]:
    replies: Sequence[str | None]
    try:
        replies = engine.generate(chats, dict(template.schema), tokens)
    except PromptTooLong as error:
        logger.warning("%s", error)
        replies = error.replies
    return [
        None
        if reply is None
        else parse_anchor(reply, template.schema, source_hash(catalog, row, template.version), engine.name)
        for row, reply in zip(rows, replies, strict=True)
    ]


def _fallback(catalog: Catalog, row: int, template: Template) -> Anchor:
    """The template's anchor, stamped with the prompt it stands for, so that the row is not asked for again."""
    made = template_anchor(catalog, row)
    return replace(made, source=source_hash(catalog, row, template.version))
