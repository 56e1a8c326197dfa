"""The near-line batch job: contexts in, stored instructions out; kill it at any moment and start it again.

Contexts are taken in fixed chunks in the order given. A chunk is generated whole and committed in one transaction,
so what a killed job leaves is exactly the chunks it finished, and the next run asks for the others alone, in the
same batches. Who is up to date (same context hash) is skipped; a reply that does not follow the schema is asked for
once more, and then replaced by the plain instruction, marked by its model "template", as is one whose prompt does not
fit the model. All of it is counted.

Several jobs may share the users between them: `in_shard` deals each user to exactly one.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from genrec.contracts import HOME, Evidence, Instruction, UserContext
from genrec.errors import GenrecError
from genrec.instructions.context import Chat, PromptWriter, Template, context_hash, has_content
from genrec.instructions.parse import parse
from genrec.instructions.plain import plain_instruction
from genrec.instructions.store import InstructionStore, Key
from genrec.tools.consult import PROPOSED, as_evidence, best_of
from serving.llm import Backend, PromptTooLong

if TYPE_CHECKING:
    from genrec.bundle import Bundle
    from genrec.data.dataset import Catalog

logger = logging.getLogger(__name__)

MAX_TOKENS = 128  # a reply at the schema's bounds has about 120
REMINDER = "\nAnswer with the JSON object alone: situation, intents, look_for. Keep each short."
CHUNK = 64

EvidenceOf = Callable[[list[UserContext]], list[Sequence[Evidence]]]


@dataclass(frozen=True)
class InstructReport:
    """What a run did. asked = current + empty + written + elsewhere + waiting.

    current: already up to date. empty: nothing to reason about, nothing stored. elsewhere: another worker is at it.
    waiting: for the next hour's budget. retried replies are either right then or replaced. replaced: written as the
    plain instruction. failures: calls to the model that failed and were repeated. prompt_tokens counts shared prefixes
    every time. seconds: wall time, the model's start not included.
    """

    asked: int
    current: int = 0
    empty: int = 0
    written: int = 0
    elsewhere: int = 0
    waiting: int = 0
    retried: int = 0
    replaced: int = 0
    failures: int = 0
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

    def as_dict(self) -> dict[str, float]:
        """JSON-ready, with the speeds."""
        speeds = {"instructions_per_second": self.instructions_per_second, "tokens_per_second": self.tokens_per_second}
        return asdict(self) | speeds

    def line(self) -> str:
        """One line for people, also while it goes on."""
        done = self.current + self.empty + self.written
        others = [
            f", {n:,} {what}"
            for n, what in (
                (self.current, "up to date"),
                (self.empty, "without history"),
                (self.elsewhere, "left to another worker"),
                (self.waiting, "waiting for the budget"),
                (self.retried, "asked again"),
                (self.replaced, "replaced by the template"),
                (self.failures, "failed calls repeated"),
            )
            if n
        ]
        return (
            f"instructions: {done:,} of {self.asked:,}, {self.written:,} written{''.join(others)}; "
            f"{self.instructions_per_second:.2f} instructions/s, {self.tokens_per_second:.0f} tokens/s, "
            f"{self.prompt_tokens:,} tokens read, {self.output_tokens:,} generated"
        )


class ChunkWriter:
    """Writes chunks of instructions: prompts, model, check, second chance, plain fallback, one transaction.

    evidence: what the tools say for a list of contexts, most important first, called once a chunk. clock: unix
    seconds, for Instruction.created. written, retried, replaced: counts over all chunks, as in InstructReport.
    """

    def __init__(
        self,
        catalog: Catalog,
        model: Backend,
        template: Template,
        store: InstructionStore,
        evidence: EvidenceOf | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.prompts = PromptWriter(catalog, template)
        self.model, self.store, self.evidence, self.clock = model, store, evidence, clock
        self.written = self.retried = self.replaced = 0
        self._before = (model.failures, model.prompt_tokens, model.output_tokens)
        self._begun = time.perf_counter()

    def write(self, contexts: Sequence[UserContext]) -> None:
        """Generates the instructions of these contexts and stores them. Raises GenrecError when the model cannot
        answer or the store cannot be written; nothing of the chunk is stored then."""
        said = consult(contexts, self.evidence)
        chats = [self.prompts.chat(context, pieces) for context, pieces in zip(contexts, said, strict=True)]
        replies = self._replies(chats, MAX_TOKENS)
        parsed = [self._parse(reply) for reply in replies]
        again = [i for i, reply in enumerate(replies) if reply is not None and parsed[i] is None]
        if again:
            # The same prompt would give the same reply: the second one is reminded, and has room for twice as much.
            second = self._replies([reminded(chats[i]) for i in again], 2 * MAX_TOKENS, needed=False)
            for i, text in zip(again, second, strict=True):
                parsed[i] = self._parse(text)
        now = self.clock()
        self.store.put_many(
            (*key(c), sign(i, c, self.prompts, self.model.name, now, pieces))
            for c, i, pieces in zip(contexts, parsed, said, strict=True)
        )
        self.written += len(contexts)
        self.retried += len(again)
        self.replaced += sum(instruction is None for instruction in parsed)

    def report(self, asked: int, **counts: int) -> InstructReport:
        """What has been done since this writer was made."""
        failures, read, generated = self._before
        return InstructReport(
            asked,
            **counts,
            written=self.written,
            retried=self.retried,
            replaced=self.replaced,
            failures=self.model.failures - failures,
            prompt_tokens=self.model.prompt_tokens - read,
            output_tokens=self.model.output_tokens - generated,
            seconds=time.perf_counter() - self._begun,
        )

    def _parse(self, reply: str | None) -> Instruction | None:
        return None if reply is None else parse(reply, self.prompts.template.schema)

    def _replies(self, chats: list[Chat], max_tokens: int, needed: bool = True) -> list[str | None]:
        """One reply per chat; None for a prompt that does not fit the model. Where none fits and some are needed, the
        model is not made for this prompt: PromptTooLong."""
        try:
            return list(self.model.generate(chats, dict(self.prompts.template.schema), max_tokens))
        except PromptTooLong as error:
            if needed and not any(reply is not None for reply in error.replies):
                raise
            logger.warning("%s", error)
            return error.replies


def instruct(
    contexts: Sequence[UserContext],
    catalog: Catalog,
    model: Backend,
    template: Template,
    store: InstructionStore,
    chunk: int = CHUNK,
    evidence: EvidenceOf | None = None,
    report: Callable[[str], None] = logger.info,
    clock: Callable[[], float] = time.time,
) -> InstructReport:
    """Writes an instruction for every context that needs one, and says after each chunk how it goes.

    contexts: each with a user; one for each user and scenario. chunk: how many are generated and committed together;
    the same chunk gives the same batches and so the same texts. evidence, clock: see ChunkWriter.
    Raises GenrecError for a context without user or a user and scenario given twice, before anything is generated.
    """
    if chunk < 1:
        raise GenrecError(f"chunk is {chunk}; it must be at least 1")
    check_contexts(contexts)
    writer = ChunkWriter(catalog, model, template, store, evidence, clock)
    current = empty = 0
    for start in range(0, len(contexts), chunk):
        part = contexts[start : start + chunk]
        able = [context for context in part if has_content(context, template)]
        todo = stale(able, catalog, template, store)
        if todo:
            writer.write(todo)
        current += len(able) - len(todo)
        empty += len(part) - len(able)
        report(writer.report(len(contexts), current=current, empty=empty).line())
    return writer.report(len(contexts), current=current, empty=empty)


def stale(
    contexts: Iterable[UserContext], catalog: Catalog, template: Template, store: InstructionStore
) -> list[UserContext]:
    """The contexts, in order, that have no instruction or one that was written from something else."""
    by_key = {key(context): context for context in contexts}
    hashes = {k: context_hash(context, catalog, template) for k, context in by_key.items()}
    return [by_key[k] for k in store.stale(hashes)]


def consult(contexts: Sequence[UserContext], evidence: EvidenceOf | None) -> list[Sequence[Evidence]]:
    """What the tools say of each context; nothing where none are asked."""
    return evidence(list(contexts)) if evidence else [()] * len(contexts)


def reminded(chat: Chat) -> Chat:
    """The chat of a second try."""
    return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + REMINDER}]


def sign(
    reply: Instruction | None,
    context: UserContext,
    prompts: PromptWriter,
    model: str,
    now: float,
    evidence: Sequence[Evidence] = (),
) -> Instruction:
    """The instruction as it is stored, with its provenance; the plain one in place of a reply that is None."""
    written = plain_instruction(context, prompts, evidence) if reply is None else replace(reply, model=model)
    return replace(
        written,
        prompt_version=prompts.template.version,
        context_hash=context_hash(context, prompts.catalog, prompts.template),
        created=now,
        events=len(context.history),
    )


def tool_evidence(bundle: Bundle) -> EvidenceOf:
    """What a bundle's tools say: first their fusion, then each one, those with the greatest weight in it first."""
    weights = bundle.fusion(HOME)["floors"]
    names = sorted(bundle.tools, key=lambda name: -weights.get(name, 0.0))

    def evidence(contexts: list[UserContext]) -> list[Sequence[Evidence]]:
        scores = {name: bundle.tools[name].score_all(contexts) for name in names}
        together = as_evidence(bundle.dataset.catalog, *best_of(scores, weights, contexts, PROPOSED))
        return [
            [together[b], *(bundle.tools[name].evidence(context, scores[name][b], PROPOSED) for name in names)]
            for b, context in enumerate(contexts)
        ]

    return evidence


def key(context: UserContext) -> Key:
    """What an instruction for this context is stored under."""
    return context.user or "", context.scenario


def in_shard(user: str, shard: int, shards: int) -> bool:
    """Whether this user belongs to shard 0, 1, ... of so many: the same one on every host and in every run."""
    return zlib.crc32(user.encode()) % shards == shard


def check_contexts(contexts: Sequence[UserContext]) -> None:
    """Raises GenrecError for a context without user, and for a user and scenario given twice."""
    seen: set[Key] = set()
    for position, context in enumerate(contexts):
        if not context.user:
            raise GenrecError(f"context {position} has no user; an instruction is stored by user and scenario")
        if key(context) in seen:
            raise GenrecError(f"user {context.user!r} is given twice for scenario {context.scenario!r}")
        seen.add(key(context))
