"""A backend without a model, for tests and dry runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from serving.llm.base import Chat


class Scripted:
    """A backend without a model: replies come from a function of the chat, or in turn from a list.

    calls: every chat it was given, in order; tokens are counted as words. Raises IndexError when the list runs out."""

    def __init__(self, replies: Callable[[Chat], str] | Sequence[str], name: str = "scripted") -> None:
        self.name = name
        self.calls: list[Chat] = []
        self.prompt_tokens = self.output_tokens = self.failures = 0
        self._replies = replies

    def generate(self, chats: list[Chat], schema: dict[str, Any] | None = None, max_tokens: int = 160) -> list[str]:
        """See LanguageModel. The schema and the bound are not enforced: a script may break them on purpose."""
        texts = []
        for chat in chats:
            self.calls.append(chat)
            texts.append(self._replies(chat) if callable(self._replies) else self._replies[len(self.calls) - 1])
            self.prompt_tokens += sum(len(turn["content"].split()) for turn in chat)
            self.output_tokens += len(texts[-1].split())
        return texts

    def close(self) -> None:
        """Nothing to free."""
