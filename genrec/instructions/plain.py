"""An instruction written without a language model: the fallback of the batch job, and an ablation of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genrec.contracts import Evidence, Instruction, UserContext
from genrec.instructions.context import PromptWriter
from genrec.instructions.targets import titles_of
from genrec.instructions.text import clean

MODEL = "template"  # what `Instruction.model` says for these


def plain_instruction(context: UserContext, writer: PromptWriter, evidence: Sequence[Evidence] = ()) -> Instruction:
    """The kinds of the context (see PromptWriter.kinds), or where there are none its newest title or query; look_for
    names the tools' best proposals before them, where the prompt shows proposals and no query was typed.

    Deterministic; always follows the template's schema. model is "template"; the other provenance is left empty.
    Raises ValueError for a context without history, trigger, query and attributes.
    """
    bounds = writer.template.schema["properties"]
    kinds = writer.kinds(context)
    newest = context.trigger if context.trigger is not None else next(reversed(context.history), None)
    if kinds:
        subject = " and ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
    elif newest is not None:
        subject = f"items like {writer.catalog.title(newest)}"
    elif context.query:
        subject = context.query
    elif context.attributes:
        subject = f"items for {', '.join(value for _, value in context.attributes)}"
    else:
        raise ValueError("nothing to write from: no history, no trigger, no query and no attributes")
    titles = titles_of(writer.proposed(evidence), (), writer.catalog)
    look_for = context.query if context.query else "; ".join([*titles, subject])
    return Instruction(
        situation=_bounded(f"lately chose {subject}" if context.history else subject, bounds["situation"]),
        intents=tuple(dict.fromkeys(_bounded(kind, bounds["intents"]["items"]) for kind in kinds or [subject])),
        look_for=_bounded(look_for, bounds["look_for"]),
        model=MODEL,
    )


def _bounded(text: str, schema: Mapping[str, Any]) -> str:
    """Cleaned text of at most maxLength bytes, so of at most as many characters."""
    text = clean(text, schema["maxLength"])
    return text if any(c.isalnum() for c in text) else "anything"
