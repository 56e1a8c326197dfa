"""Consult, generate, fuse, filter, trace: the one place where all parts of genrec meet.

from genrec import Recommender
recommender = Recommender.load("bundle")
context = recommender.context(history=["50", "181"])
trace = recommender.recommend(context, k=10)
for item in trace.recommended: print(item.title, item.score)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from genrec.bundle import Bundle
from genrec.candidates import GENERATOR, POPULARITY, Shortlist, allowed_items, shortlist
from genrec.contracts import HOME, SEARCH, Evidence, Instruction, Recommended, Trace, UserContext
from genrec.data.schema import attribute
from genrec.errors import GenrecError
from genrec.instructions.store import Key, query_key
from genrec.tools import Tool

logger = logging.getLogger(__name__)

MAX_HISTORY = 10_000
MAX_INSTRUCTION = 500  # characters
STORE_REST = 10.0  # seconds
EMBEDDED = 4096  # texts whose embeddings are kept: a stored instruction serves many requests


class Recommender:
    """Recommends from a bundle, for one request or a batch, for known users, unknown ones and empty histories."""

    def __init__(self, bundle: Bundle, width: int = 50, evidence: int = 5) -> None:
        """width: beams of the generator. evidence: items per tool that a trace shows."""
        self.bundle = bundle
        self.width = width
        self.evidence = evidence
        self._store_back = 0.0  # monotonic time at which a store that failed is asked again
        self._embedded: dict[str, np.ndarray] = {}  # by text, those used last at the end

    @classmethod
    def load(cls, folder: Path | str, instructions: Path | str | None = None) -> Recommender:
        """folder, instructions: see Bundle.load."""
        return cls(Bundle.load(folder, instructions))

    def context(
        self,
        user: str | None = None,
        history: Sequence[str] | None = None,
        scenario: str = HOME,
        trigger: str | None = None,
        query: str | None = None,
        attributes: Sequence[tuple[str, str]] | None = None,
    ) -> UserContext:
        """A request. history: item identifiers, oldest first; when None it is the user's own, from the data set.
        attributes: what is known about the user, as (name, value); when None it is what the data set says.

        Raises GenrecError for an unknown item, scenario, attribute, or a user without history in the data set.
        """
        catalog, sequences = self.bundle.dataset.catalog, self.bundle.dataset.sequences
        if scenario not in self.bundle.dataset.scenarios:
            known = ", ".join(self.bundle.dataset.scenarios)
            raise GenrecError(f"unknown scenario {scenario!r}; this bundle has: {known}")
        base, position = UserContext(), None if user is None else sequences.position(user)
        if history is not None:
            if len(history) > MAX_HISTORY:
                raise GenrecError(f"the history has {len(history)} items; at most {MAX_HISTORY} are read")
            base = UserContext(history=tuple(catalog.row(i) for i in history))
        elif user is not None:
            if position is None:
                raise GenrecError(f"unknown user {user!r}: give a history (it may be empty), or a user of the data set")
            base = sequences.context(position)
        row = None if trigger is None else catalog.row(trigger)
        if scenario == "item" and row is None and base.history:
            row = base.history[-1]
        if attributes is None:
            attributes = () if position is None else sequences.attributes_of(position)
        attributes = tuple(attribute(str(name), str(value)) for name, value in attributes)
        if unknown := next((name for name, _ in attributes if name not in sequences.attribute_names), None):
            known = ", ".join(sequences.attribute_names) or "none"
            raise GenrecError(f"unknown attribute {unknown[:60]!r}; those of this bundle's users: {known}")
        return replace(
            base,
            user=user,
            scenario=scenario,
            trigger=row,
            query=query.strip() if query else None,
            attributes=tuple(attributes),
        )

    def recommend(
        self,
        context: UserContext,
        k: int = 10,
        instruction: str | Instruction | None = None,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        weights: Mapping[str, float] | None = None,
        tools: Mapping[str, Tool] | None = None,
    ) -> Trace:
        """One request; see recommend_batch."""
        return self.recommend_batch([context], k, [instruction], allow, deny, weights, tools)[0]

    def recommend_batch(
        self,
        contexts: Sequence[UserContext],
        k: int = 10,
        instructions: Sequence[str | Instruction | None] | None = None,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        weights: Mapping[str, float] | None = None,
        tools: Mapping[str, Tool] | None = None,
    ) -> list[Trace]:
        """Traces of B requests; trace.recommended holds at most k items, best first, none seen before.

        instructions: per request a text or an Instruction to follow; None takes the context's query, else the
        stored instruction of the user and scenario, else the model's learned default. A text is what somebody asks
        for now: at home it makes the request a search, and tools that read queries hear it too; where its rewriting is
        stored, the generator follows both. An Instruction was
        written ahead of the request and leaves its scenario as it is. allow, deny: item identifiers. weights: of the
        parts in the fusion, in place of those chosen on validation; a part that is missing or 0 is left out. tools: in
        place of the bundle's of the same names, as `EBR.steered` and `CAPTS.steered` make them.
        """
        if k < 1:
            raise GenrecError(f"k is {k}; ask for at least 1 item")
        contexts = list(contexts)
        if not contexts:
            return []
        catalog = self.bundle.dataset.catalog
        consulted = {name: (tools or {}).get(name, tool) for name, tool in self.bundle.tools.items()}
        known = {*consulted, *self.bundle.rankers, GENERATOR}
        unknown = sorted(set(weights or {}) - known)
        if unknown:
            raise GenrecError(f"unknown part {unknown[0]!r} in the weights; there are: {', '.join(sorted(known))}")
        clock = time.perf_counter()
        given = list(instructions) if instructions is not None else [None] * len(contexts)
        chosen = [self._instruction(c, i) for c, i in zip(contexts, given, strict=True)]
        contexts = [self._asked(c, i) for c, i in zip(contexts, given, strict=True)]
        vectors = self._vectors(chosen)
        thinking = time.perf_counter() - clock
        allowed = allowed_items(
            contexts,
            len(catalog),
            None if allow is None else np.array([catalog.row(i) for i in allow], np.int64),
            np.array([catalog.row(i) for i in deny], np.int64) if deny else None,
        )
        traces: dict[int, Trace] = {}
        for scenario in dict.fromkeys(c.scenario for c in contexts):
            at = [b for b, c in enumerate(contexts) if c.scenario == scenario]
            heard = self.bundle.fusion(scenario)["fused"] if weights is None else weights
            rankers = {name: ranker for name, ranker in self.bundle.rankers.items() if heard.get(name)}
            parts = shortlist(
                [contexts[b] for b in at],
                consulted,
                self.bundle.fusion(scenario)["floors"],
                self.bundle.generator,
                allowed[at],
                vectors[at],
                width=max(self.width, k),
                most=max(100, k),
                rankers=rankers,
            )
            parts.seconds["instruction"] = thinking * len(at) / len(contexts)
            for i, b in enumerate(at):
                traces[b] = self._trace(contexts[b], *chosen[b], parts, i, k, weights, consulted)
        return [traces[b] for b in range(len(contexts))]

    def _judged(self, context: UserContext, name: str, one: Shortlist) -> Evidence:
        """What a ranker says of the shortlist of one request: its best items, and why the first of them."""
        order = np.lexsort((one.rows[0], -one.parts[name][0]))
        rows = one.rows[0, order[one.rows[0, order] >= 0][: self.evidence]]
        reasons = self.bundle.rankers[name].explain(context, rows)
        scores = np.array([reason.score for reason in reasons], np.float32)
        said = reasons[0].sentence if reasons else f"{name} has nothing to judge."
        return Evidence(name, rows.astype(np.int32), scores, said)

    def _asked(self, context: UserContext, given: str | Instruction | None) -> UserContext:
        """The request as the parts see it: a text typed for it is its query, and makes a home request a search."""
        if isinstance(given, Instruction):
            return context
        text = ((given or "").strip() or context.query or "")[:MAX_INSTRUCTION]
        if not text:
            return context
        searched = context.scenario == HOME and SEARCH in self.bundle.dataset.scenarios
        return replace(context, query=text, scenario=SEARCH if searched else context.scenario)

    def _instruction(self, context: UserContext, given: str | Instruction | None) -> tuple[Instruction | None, str]:
        """What the generator is told, and where that comes from. A bundle of own embeddings has no text encoder: a
        text given to it is an error, a stored instruction is left aside."""
        if self.bundle.config["embeddings"]:
            if given or context.query:
                raise GenrecError(
                    "this bundle was fitted with own embeddings and cannot read text; leave out query and instruction, "
                    "or fit it again without --embeddings"
                )
            return None, "default"
        if isinstance(given, Instruction):
            return given, "given"
        typed = (given or "").strip()
        if text := typed or context.query:
            if rewritten := self._first([query_key(text)]):
                both = f"{text}; {rewritten.look_for}"[:MAX_INSTRUCTION]
                return replace(rewritten, look_for=both), "rewritten"
            return Instruction("", (), text[:MAX_INSTRUCTION]), "given" if typed else "query"
        stored = None if context.user is None else self.stored(context.user, context.scenario)
        return stored, "default" if stored is None else "stored"

    def stored(self, user: str, scenario: str) -> Instruction | None:
        """What is stored for a user in a scenario, else for home."""
        return self._first([(user, scenario)] + ([(user, HOME)] if scenario != HOME else []))

    def _first(self, keys: list[Key]) -> Instruction | None:
        """The first of these that is stored. A store that fails is no reason to fail a request, or to keep the next
        ones waiting: for some seconds it counts as empty, and a warning says so."""
        if time.monotonic() < self._store_back:
            return None
        try:
            return next(filter(None, self.bundle.store.get_many(keys)), None)
        except GenrecError as error:
            self._store_back = time.monotonic() + STORE_REST
            logger.warning("requests go on without stored instructions: %s", error)
            return None

    def _vectors(self, chosen: list[tuple[Instruction | None, str]]) -> np.ndarray:
        """Text embeddings [B, text_dim]; NaN rows where there is no instruction."""
        out = np.full((len(chosen), self.bundle.embeddings.shape[1]), np.nan, np.float32)
        told = {i: instruction.look_for for i, (instruction, _) in enumerate(chosen) if instruction is not None}
        texts = dict.fromkeys(told.values())
        known = {text: v for text in texts if (v := self._embedded.pop(text, None)) is not None}
        if new := [text for text in texts if text not in known]:
            known |= zip(new, self.bundle.embedder(new), strict=True)
        self._embedded |= known  # those just used are the newest
        for text in list(self._embedded)[:-EMBEDDED]:
            self._embedded.pop(text, None)
        for i, text in told.items():
            out[i] = known[text]
        return out

    def _weights(self, context: UserContext, given: Mapping[str, float] | None, told: bool) -> dict[str, float]:
        """The fusion weights of one request: given ones, else those chosen on validation. With neither history nor
        query the tools are silent: popularity leads, and the generator joins it where an instruction steers it."""
        if given is not None:
            return {name: float(w) for name, w in given.items() if w}
        silent = not context.history and context.trigger is None and not context.query
        if silent and POPULARITY in self.bundle.tools:
            return {POPULARITY: 1.0} | ({GENERATOR: 1.0} if told else {})
        return {name: w for name, w in self.bundle.fusion(context.scenario)["fused"].items() if w}

    def _trace(
        self,
        context: UserContext,
        instruction: Instruction | None,
        source: str,
        parts: Shortlist,
        b: int,
        k: int,
        given: Mapping[str, float] | None,
        tools: Mapping[str, Tool],
    ) -> Trace:
        catalog = self.bundle.dataset.catalog
        weights = self._weights(context, given, instruction is not None)
        one = Shortlist(
            parts.rows[b : b + 1],
            {n: p[b : b + 1] for n, p in parts.parts.items()},
            {},
            parts.beam,
            parts.beam_scores,
            {},
        )
        scores = one.fuse(weights)[0]
        best = [i for i in one.order(weights)[0].tolist() if one.rows[0, i] >= 0][:k]
        codes = self.bundle.semantic_ids.codes
        recommended = tuple(
            Recommended(
                row := int(one.rows[0, i]),
                catalog.item(row),
                catalog.title(row),
                float(scores[i]),
                tuple(int(c) for c in codes[row]),
                {name: float(part[0, i]) for name, part in one.parts.items() if weights.get(name)},
            )
            for i in best
        )
        clock = time.perf_counter()
        evidence: tuple[Evidence, ...] = (
            *(tool.evidence(context, parts.raw[name][b], self.evidence) for name, tool in tools.items()),
            *(self._judged(context, name, one) for name in self.bundle.rankers if name in one.parts),
        )
        told = time.perf_counter()
        beam = tuple(
            (int(row), float(score))
            for row, score in zip(parts.beam[b, :k], parts.beam_scores[b, :k], strict=True)
            if row >= 0
        )
        seconds = {name: round(s / len(parts.rows), 6) for name, s in parts.seconds.items()}
        seconds["evidence"] = round(told - clock, 6)
        heard = instruction is None or weights.get(GENERATOR) or (context.query and weights.get("content"))
        note = "" if heard else "the fusion gives no weight to a part that reads the instruction"
        return Trace(context, instruction, source, evidence, beam, weights, recommended, seconds, note)
