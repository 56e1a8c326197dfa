"""Slow thinking without the model: prompts' content, checked replies, the store, and when they are stale."""

from genrec.instructions.context import PromptWriter, Template, context_hash, has_content
from genrec.instructions.parse import parse
from genrec.instructions.plain import plain_instruction
from genrec.instructions.store import InstructionStore, open_store

__all__ = [
    "InstructionStore",
    "PromptWriter",
    "Template",
    "context_hash",
    "has_content",
    "open_store",
    "parse",
    "plain_instruction",
]
