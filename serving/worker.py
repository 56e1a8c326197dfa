"""The near-line worker: it follows the interactions and rewrites the stalest instructions first, within a budget.

OxygenREC regenerates a user's instruction about once per five-minute window (1.4); here a round starts every
`every` seconds. What is stale is our choice, and a setting: an instruction that does not know of at least `window` of
the user's newest events, is older than `max_age`, was written by another prompt, or from a history that has changed.
Stalest is the one that misses most events (all of them, where none is written yet), among equals the oldest.

Interactions arrive as files: the data source is read again whenever one of its files has changed. A file that is
caught while it is written is an error for one round; write it elsewhere and rename it, and that does not happen.

A chunk is claimed in the store before it is generated, so any number of workers may share a store, on one host or on
many; a claim ends when its chunk is stored, when the worker stops, or, after a kill, with its lease. There is no other
state: what is stale follows from the store and the interactions alone, so a worker may be killed and started at will.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from genrec.contracts import HOME, Instruction, UserContext
from genrec.data import SCENARIOS, load_dataset
from genrec.data.dataset import Catalog, Sequences
from genrec.errors import GenrecError
from genrec.instructions.context import PromptWriter, Template, context_hash, has_content
from genrec.instructions.store import InstructionStore
from serving.instruct import CHUNK, MAX_TOKENS, ChunkWriter, EvidenceOf, InstructReport, key
from serving.llm import Backend

logger = logging.getLogger(__name__)

HOUR, DAY = 3600.0, 86400.0
BYTES_PER_TOKEN = 3.0  # a low guess, so that the budget's estimate is high; English has about 4
EVIDENCE = 160  # bytes of one of the tools' sentences or proposals in a prompt, at most


@dataclass(frozen=True)
class WorkerConfig:
    """scenarios: an instruction is kept for each. window: new events that make an instruction stale. max_age: seconds
    after which it is stale anyway. expire: seconds after which one that nobody has rewritten is deleted. tokens: the
    budget per hour, read and generated together; None for no bound. every: seconds from one round's start to the next.
    chunk: instructions generated and committed together. lease: seconds for which a chunk is claimed; it must be
    longer than a chunk takes."""

    scenarios: tuple[str, ...] = (HOME,)
    window: int = 3
    max_age: float = 7 * DAY
    expire: float = 30 * DAY
    tokens: int | None = None
    every: float = 300.0
    chunk: int = CHUNK
    lease: float = 600.0

    def __post_init__(self) -> None:
        for name in ("window", "max_age", "every", "chunk", "lease", "tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise GenrecError(f"{name} is {value}; it must be above 0")
        if self.expire < self.max_age:
            raise GenrecError(f"expire ({self.expire:g} s) is shorter than max_age ({self.max_age:g} s)")
        unknown = [name for name in self.scenarios if name not in SCENARIOS]
        if unknown or not self.scenarios:
            raise GenrecError(f"unknown scenario {(unknown or [''])[0]!r}; there are: {', '.join(SCENARIOS)}")


class Interactions:
    """The users' sequences in a data source (see load_dataset), in rows of another catalogue, as they are now.

    Events of items that this catalogue does not hold are left out, and reported: a fit brings them in. fitted: the
    sequences of the bundle, whose users keep the attributes they were fitted with, as `genrec instruct` has them.
    """

    def __init__(
        self,
        source: str,
        catalog: Catalog,
        report: Callable[[str], None] = logger.info,
        fitted: Sequences | None = None,
    ) -> None:
        self.source, self.catalog, self.report, self.fitted = source, catalog, report, fitted
        self._seen: object = None
        self._sequences: Sequences | None = None

    def sequences(self) -> Sequences:
        """Read again if a file has changed. Raises GenrecError, as load_dataset does."""
        now = self._files()
        if self._sequences is None or now != self._seen:
            dataset = load_dataset(self.source)
            rows = {item: row for row, item in enumerate(self.catalog.items)}
            mapping = np.array([rows.get(item, -1) for item in dataset.catalog.items], np.int32)
            mapped = mapping[dataset.sequences.items]
            kept = dataset.sequences.keep(mapped >= 0)
            known = [self._attributes(kept, u) for u in range(len(kept))]
            self._sequences, self._seen = replace(kept, items=mapped[mapped >= 0], attributes=known), now
            missing = int((mapped < 0).sum())
            self.report(
                f"{self.source}: {len(kept):,} users, {kept.events:,} events"
                + (f"; {missing:,} events of items that the bundle does not know are left out" if missing else "")
            )
        return self._sequences

    def _attributes(self, now: Sequences, u: int) -> tuple[tuple[str, str], ...]:
        known = None if self.fitted is None else self.fitted.position(now.users[u])
        return now.attributes_of(u) if self.fitted is None or known is None else self.fitted.attributes_of(known)

    def _files(self) -> list[tuple[str, int, int]]:
        """Name, time and size of every file of the source; none for a named data set."""
        path = Path(self.source.removeprefix("amazon14:")).expanduser()
        try:
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            states = [(file.name, file.stat()) for file in files if file.is_file()]
        except OSError as error:  # a file went away in between
            raise GenrecError(f"{self.source} cannot be read ({error})") from None
        return [(name, state.st_mtime_ns, state.st_size) for name, state in states]


def contexts_of(sequences: Sequences, scenarios: Sequence[str] = (HOME,)) -> list[UserContext]:
    """Every user in each of these scenarios, as requests of that moment would be; without a query."""
    found = []
    for u in range(len(sequences)):
        base = sequences.context(u)
        for name in scenarios:
            trigger = base.history[-1] if base.history and SCENARIOS[name].trigger else None
            found.append(replace(base, scenario=name, trigger=trigger))
    return found


class Budget:
    """Tokens for any sixty minutes. A worker that is started again begins with a full one."""

    def __init__(self, tokens: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens, self._clock = tokens, clock
        self._spent: deque[tuple[float, int]] = deque()

    def left(self) -> float:
        """Tokens that may be spent now."""
        while self._spent and self._spent[0][0] <= self._clock() - HOUR:
            self._spent.popleft()
        return float("inf") if self.tokens is None else self.tokens - sum(tokens for _, tokens in self._spent)

    def spend(self, tokens: int) -> None:
        self._spent.append((self._clock(), tokens))


class Worker:
    """Keeps the instructions of a store fresh. catalog: of the contexts. open_model: called when there is first
    something to write. clock: unix seconds."""

    def __init__(
        self,
        catalog: Catalog,
        template: Template,
        store: InstructionStore,
        open_model: Callable[[], Backend],
        config: WorkerConfig,
        evidence: EvidenceOf | None = None,
        report: Callable[[str], None] = logger.info,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.prompts, self.store, self.config = PromptWriter(catalog, template), store, config
        self.evidence, self.report, self.clock = evidence, report, clock
        self.budget = Budget(config.tokens)
        self._open_model = open_model
        self._model: Backend | None = None

    def run(self, interactions: Interactions, once: bool = False) -> InstructReport:
        """Rounds without end, or one. What fails (a server, the store, a file) ends a round, not the worker: the next
        one tries again; with `once` the GenrecError is raised."""
        try:
            while True:
                begun = time.monotonic()
                try:
                    done = self.round(contexts_of(interactions.sequences(), self.config.scenarios))
                    if once:
                        return done
                except GenrecError as error:
                    if once:
                        raise
                    self.report(f"{error}; the next round is in {self.config.every:g} s")
                time.sleep(max(0.0, begun + self.config.every - time.monotonic()))
        finally:
            if self._model is not None:
                self._model.close()

    def round(self, contexts: Sequence[UserContext]) -> InstructReport:
        """Writes what is stale and affordable, stalest first; what fails leaves the chunks before it stored."""
        now = self.clock()
        if expired := self.store.expire(now - self.config.expire):
            self.report(f"{expired:,} instructions expired")
        able = [context for context in contexts if has_content(context, self.prompts.template)]
        todo = self.stalest(able)
        counts = {"current": len(able) - len(todo), "empty": len(contexts) - len(able)}
        if not todo:
            self.report(f"instructions: {counts['current']:,} are fresh")
            return InstructReport(len(contexts), **counts)
        if self._model is None:
            self.store.put_many(())  # say so before the model starts, where it cannot be written
            self._model = self._open_model()
        writer = ChunkWriter(
            self.prompts.catalog, self._model, self.prompts.template, self.store, self.evidence, self.clock
        )
        position = elsewhere = 0
        while part := self._affordable(todo[position : position + self.config.chunk]):
            position += len(part)
            mine = self._claim(part)
            elsewhere += len(part) - len(mine)
            if mine:
                self._write(writer, mine)
            self.report(writer.report(len(contexts), **counts, elsewhere=elsewhere).line())
        waiting = len(todo) - position
        if waiting:
            self.report(f"instructions: {waiting:,} wait, the hour's budget of {self.config.tokens:,} tokens is spent")
        return writer.report(len(contexts), **counts, elsewhere=elsewhere, waiting=waiting)

    def stalest(self, contexts: Sequence[UserContext]) -> list[UserContext]:
        """The contexts with a stale instruction or none, stalest first."""
        found = self.store.get_many([key(context) for context in contexts])
        missed = [self._missed(context, i) for context, i in zip(contexts, found, strict=True)]
        order = sorted(
            (-events, i.created if i else 0.0, key(context), at)
            for at, (context, i, events) in enumerate(zip(contexts, found, missed, strict=True))
            if events is not None
        )
        return [contexts[at] for *_, at in order]

    def _missed(self, context: UserContext, found: Instruction | None) -> int | None:
        """How many events a stale instruction does not know of; None for a fresh one."""
        events, catalog, template = len(context.history), self.prompts.catalog, self.prompts.template
        if found is None:
            return events
        if found.context_hash == context_hash(context, catalog, template):
            return 0 if self.clock() - found.created > self.config.max_age else None
        new = events - found.events
        fresh = (
            0 < new < self.config.window
            and found.context_hash == context_hash(before(context, found.events), catalog, template)
            and self.clock() - found.created <= self.config.max_age
        )
        return None if fresh else max(new, 0)

    def _affordable(self, contexts: Sequence[UserContext]) -> Sequence[UserContext]:
        """As many of the first of these as the budget bears, by an estimate that is rather too high."""
        left = self.budget.left()
        if left == float("inf"):
            return contexts
        template = self.prompts.template
        more = EVIDENCE * (template.sentences + template.proposals) if self.evidence else 0
        for n, context in enumerate(contexts):
            size = sum(len(turn["content"].encode()) for turn in self.prompts.chat(context)) + more
            cost = size / BYTES_PER_TOKEN + MAX_TOKENS
            if self.config.tokens is not None and cost > self.config.tokens:
                raise GenrecError(f"tokens is {self.config.tokens}; one instruction needs about {cost:.0f}")
            left -= cost
            if left < 0:
                return contexts[:n]
        return contexts

    def _claim(self, contexts: Sequence[UserContext]) -> list[UserContext]:
        """Those of the contexts that are this worker's now. One that another has written meanwhile is not."""
        by_key = {key(context): context for context in contexts}
        claimed = self.store.claim(list(by_key), self.config.lease)
        mine = self.stalest([by_key[k] for k in claimed])
        kept = {key(context) for context in mine}
        self.store.release([k for k in claimed if k not in kept])
        return mine

    def _write(self, writer: ChunkWriter, contexts: Sequence[UserContext]) -> None:
        model = writer.model
        before = model.prompt_tokens + model.output_tokens
        try:
            writer.write(contexts)
        except BaseException:
            with contextlib.suppress(GenrecError):
                self.store.release([key(context) for context in contexts])
            raise
        finally:
            self.budget.spend(model.prompt_tokens + model.output_tokens - before)


def before(context: UserContext, events: int) -> UserContext:
    """The context as it was after the first `events` of its events; a page about the newest item was about the newest
    one then."""
    history = context.history[:events]
    trigger = history[-1] if context.trigger is not None and history else context.trigger
    return replace(context, history=history, times=(), weights=(), trigger=trigger)
