"""The near-line batch job: contexts in, stored instructions out; kill it at any moment and start it again.

Contexts are taken in fixed chunks in the order given. A chunk is generated whole and committed in one transaction,
so what a killed job leaves is exactly the chunks it finished, and the next run asks for the others alone, in the
same batches. Who is up to date (same context hash) is skipped; a reply that does not follow the schema is asked for
once more, and then replaced by the plain instruction, marked by its model "template". All of it is counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from genrec.contracts import Instruction, UserContext
from genrec.errors import GenrecError
from genrec.instructions.context import Chat, PromptWriter, Template, context_hash, has_content
from genrec.instructions.parse import parse
from genrec.instructions.plain import plain_instruction
from genrec.instructions.store import InstructionStore, Key
from serving.llm import Backend

if TYPE_CHECKING:
    from genrec.data.dataset import Catalog

logger = logging.getLogger(__name__)

MAX_TOKENS = 96  # a reply at the schema's bounds has about 90
REMINDER = "\nAnswer with the JSON object alone: situation, intents, look_for. Keep each short."

EvidenceOf = Callable[[list[UserContext]], list[Sequence[str]]]


@dataclass(frozen=True)
class InstructReport:
    """What a run did. asked = current + empty + written; retried replies are either right then or replaced.

    current: already up to date. empty: nothing to reason about, nothing stored. replaced: written as the plain
    instruction. prompt_tokens counts shared prefixes every time. seconds: wall time, the model's start not included.
    """

    asked: int
    current: int = 0
    empty: int = 0
    written: int = 0
    retried: int = 0
    replaced: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0

    @property
    def instructions_per_second(self) -> float:
        return self.written / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.current + self.empty + self.written}/{self.asked} users: {self.written} written, "
            f"{self.current} up to date, {self.empty} without history, {self.retried} asked again, "
            f"{self.replaced} replaced by the template; {self.instructions_per_second:.2f} instructions/s, "
            f"{self.tokens_per_second:.0f} tokens/s"
        )


def instruct(
    contexts: Sequence[UserContext],
    catalog: Catalog,
    model: Backend,
    template: Template,
    store: InstructionStore,
    chunk: int = 64,
    evidence: EvidenceOf | None = None,
    report: Callable[[str], None] = logger.info,
    clock: Callable[[], float] = time.time,
) -> InstructReport:
    """Writes an instruction for every context that needs one, and says after each chunk how it goes.

    contexts: each with a user; one for each user and scenario. chunk: how many are generated and committed together;
    the same chunk gives the same batches and so the same texts. evidence: the tools' sentences for a list of
    contexts, most important first, called once a chunk. clock: unix seconds, for Instruction.created.
    Raises GenrecError for a context without user or a user and scenario given twice, before anything is generated.
    """
    if chunk < 1:
        raise GenrecError(f"chunk is {chunk}; it must be at least 1")
    _check(contexts)
    writer = PromptWriter(catalog, template)
    done, started = InstructReport(asked=len(contexts)), time.perf_counter()
    tokens = (model.prompt_tokens, model.output_tokens)
    for start in range(0, len(contexts), chunk):
        part = list(contexts[start : start + chunk])
        able = [context for context in part if has_content(context)]
        hashes = {_key(context): context_hash(context, catalog, template.version) for context in able}
        stale = set(store.stale(hashes))
        todo = [context for context in able if _key(context) in stale]
        if todo:
            written, retried, replaced = _write(todo, writer, model, evidence)
            now = clock()
            store.put_many(
                (*key, replace(i, prompt_version=template.version, context_hash=hashes[key], created=now))
                for key, i in zip(map(_key, todo), written, strict=True)
            )
            done = replace(done, retried=done.retried + retried, replaced=done.replaced + replaced)
        done = replace(
            done,
            current=done.current + len(able) - len(todo),
            empty=done.empty + len(part) - len(able),
            written=done.written + len(todo),
            prompt_tokens=model.prompt_tokens - tokens[0],
            output_tokens=model.output_tokens - tokens[1],
            seconds=time.perf_counter() - started,
        )
        report(done.line())
    return done


def _write(
    contexts: list[UserContext], writer: PromptWriter, model: Backend, evidence: EvidenceOf | None
) -> tuple[list[Instruction], int, int]:
    """One instruction per context, with how many were asked for again and how many were replaced."""
    schema = dict(writer.template.schema)
    sentences = evidence(contexts) if evidence else [()] * len(contexts)
    chats = [writer.chat(context, said) for context, said in zip(contexts, sentences, strict=True)]
    replies = [parse(text, schema) for text in model.generate(chats, schema, MAX_TOKENS)]
    again = [i for i, reply in enumerate(replies) if reply is None]
    if again:
        # The same prompt would give the same reply: the second one is reminded, and has room for twice as much.
        for i, text in zip(
            again, model.generate([_reminded(chats[i]) for i in again], schema, 2 * MAX_TOKENS), strict=True
        ):
            replies[i] = parse(text, schema)
    written = [
        replace(reply, model=model.name) if reply else plain_instruction(context, writer)
        for context, reply in zip(contexts, replies, strict=True)
    ]
    return written, len(again), sum(reply is None for reply in replies)


def _reminded(chat: Chat) -> Chat:
    return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + REMINDER}]


def _key(context: UserContext) -> Key:
    return context.user or "", context.scenario


def _check(contexts: Sequence[UserContext]) -> None:
    seen: set[Key] = set()
    for position, context in enumerate(contexts):
        if not context.user:
            raise GenrecError(f"context {position} has no user; an instruction is stored by user and scenario")
        if _key(context) in seen:
            raise GenrecError(f"user {context.user!r} is given twice for scenario {context.scenario!r}")
        seen.add(_key(context))
