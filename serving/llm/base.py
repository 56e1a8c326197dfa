"""What every language-model backend offers, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from genrec.contracts import LanguageModel
from genrec.errors import GenrecError
from serving.models import prompt_of

Chat = list[dict[str, str]]

# SmolLM2-135M without it: "comedy, comedy, comedy, ..."; at 1.1 and above it breaks out of the language into
# markup, because the quotation marks of the JSON are penalised too.
REPETITION_PENALTY = 1.05
PLAIN = 1.0  # no penalty
CONTEXT_TOKENS = 4096  # prompt and reply together


def repetition_penalty(model: str | None) -> float:
    """The penalty that a model is decoded with: none for a fine-tuned adapter, whose reply is to repeat the prompt's
    labels. With 1.05 the shipped one stopped after one or two of them: docs/slow-thinking.md has the figures."""
    return PLAIN if prompt_of(model) else REPETITION_PENALTY


class Backend(LanguageModel, Protocol):
    """A LanguageModel that counts, over all its calls, and can let go of its memory.

    generate raises GenrecError when the model cannot answer at all, and PromptTooLong when some chats do not fit it.
    prompt_tokens counts shared prefixes every time. failures: calls that failed and were repeated.
    """

    prompt_tokens: int
    output_tokens: int
    failures: int

    def generate(self, chats: list[Chat], schema: dict[str, Any] | None = None, max_tokens: int = 160) -> list[str]: ...

    def close(self) -> None: ...


class PromptTooLong(GenrecError):
    """Some chats of a call do not fit the model. replies: what the others got, None in the place of each of these."""

    def __init__(self, message: str, replies: Sequence[str | None]) -> None:
        super().__init__(message)
        self.replies = list(replies)


def generate_fitting(
    chats: list[Chat], tokens: Sequence[int], limit: int, name: str, generate: Callable[[list[Chat]], list[str]]
) -> list[str]:
    """The replies of `generate` where every chat fits; else PromptTooLong with the replies to those that do.

    tokens: of each chat, with room for its reply; at most `limit` fit the model of this name.
    """
    fits = [n <= limit for n in tokens]
    if all(fits):
        return generate(chats)
    fitting = [chat for chat, ok in zip(chats, fits, strict=True) if ok]
    replies = iter(generate(fitting) if fitting else [])
    raise PromptTooLong(
        f"a prompt and its reply of {max(tokens)} tokens do not fit {name} ({limit})",
        [next(replies) if ok else None for ok in fits],
    )


def chat_tokens(tokenizer: Any, chats: Sequence[Chat]) -> list[list[int]]:
    """The prompts as a model with a transformers tokenizer reads them."""
    return list(tokenizer.apply_chat_template(list(chats), add_generation_prompt=True, return_dict=True)["input_ids"])
