"""The small vocabulary that every part of genrec shares.

Items are *rows*: integers that index the catalogue. Strings appear only at the edges (files, command
line, page). Everything here is frozen; nothing here imports numpy or torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from genrec.data.dataset import Catalog, Sequences

MAX_ATTRIBUTES = 8  # of a user, the first ones; further ones are not read
HOME, SEARCH = "home", "search"  # the scenarios that code knows by name; all are in genrec.data.scenarios


@dataclass(frozen=True)
class UserContext:
    """What is known about one request.

    history: catalogue rows, oldest first. times: unix seconds, same length as history, or empty.
    weights: behaviour or rating weight of each event (1.0 is neutral), same length, or empty.
    trigger: the row of the item the page is about (scenario ``item``), else None.
    query: what the user typed (scenario ``search`` or steering), else None.
    clock: unix seconds of the request, else None. It is never the time of the wanted item.
    attributes: what is known about the user, as (name, value), most important first: ("age", "24"); untrusted text.
    """

    history: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    user: str | None = None
    scenario: str = HOME
    trigger: int | None = None
    query: str | None = None
    clock: float | None = None
    attributes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("times", "weights"):
            values = getattr(self, name)
            if values and len(values) != len(self.history):
                raise ValueError(f"{name} has {len(values)} entries for a history of {len(self.history)}")


@dataclass(frozen=True)
class Evidence:
    """What one tool says for one context: rows with scores (best first) and one plain sentence.

    items: int32 [k]; scores: float32 [k], in the tool's own units; sentence: shown in prompts and traces.
    vector: the user as the tool sees them, float32 [d], where it has such a vector. details: how it came about, for
    traces, plain JSON values.
    """

    tool: str
    items: np.ndarray
    scores: np.ndarray
    sentence: str
    vector: np.ndarray | None = None
    details: dict[str, Any] | None = None


@runtime_checkable
class Retriever(Protocol):
    """A tool that proposes items. Fitted on training sequences only; works alone; can be switched off."""

    name: str

    def fit(self, train: Sequences, catalog: Catalog) -> Self: ...

    def score_all(self, contexts: list[UserContext]) -> np.ndarray:
        """Scores of the whole catalogue, float32 [len(contexts), items]; higher is better."""
        ...

    def retrieve(self, contexts: list[UserContext], k: int) -> list[Evidence]:
        """The k best rows per context, history excluded."""
        ...

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path) -> Self: ...


@runtime_checkable
class Ranker(Protocol):
    """A tool that judges given candidates. Fitted on training events only; works alone; can be switched off."""

    name: str

    def score(self, contexts: list[UserContext], items: np.ndarray) -> np.ndarray:
        """float32 [B, C] of candidate rows, int [B, C] with -1 as padding; higher is better, -inf at padding."""
        ...


@dataclass(frozen=True)
class Instruction:
    """A contextual reasoning instruction (OxygenREC, I_r), written by a language model away from the request.

    look_for is the query text that is embedded; the rest is for people and for the trace.
    context_hash ties it to the history it was written for: another hash means it is stale. events: how many events
    that history had. created: unix seconds.
    """

    situation: str
    intents: tuple[str, ...]
    look_for: str
    rationale: str = ""
    model: str = ""
    prompt_version: str = ""
    context_hash: str = ""
    created: float = 0.0
    events: int = 0


@runtime_checkable
class LanguageModel(Protocol):
    """A text backend: in: chats as lists of {"role", "content"}; out: one text per chat, in order."""

    name: str

    def generate(
        self, chats: list[list[dict[str, str]]], schema: dict[str, Any] | None = None, max_tokens: int = 160
    ) -> list[str]: ...


@dataclass(frozen=True)
class Recommended:
    """One recommended item with the scores that put it there (standardised, before weighting)."""

    row: int
    item: str
    title: str
    score: float
    semantic_id: tuple[int, ...]
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """Everything that led to one list: what went in, what each part said, what came out. JSON-ready by `as_dict`."""

    context: UserContext
    instruction: Instruction | None
    instruction_source: str  # "stored", "given", "query", "rewritten" or "default"
    evidence: tuple[Evidence, ...]
    beam: tuple[tuple[int, float], ...]  # (row, log-probability), best first
    weights: dict[str, float]
    recommended: tuple[Recommended, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    note: str = ""  # what the reader should know about this list, as that nothing heard the instruction

    def as_dict(self, catalog: Catalog) -> dict[str, Any]:
        """Plain lists, numbers and strings; rows become item identifiers with titles."""

        def named(row: int) -> dict[str, str]:
            return {"item": catalog.item(row), "title": catalog.title(row)}

        c = self.context
        return {
            "context": {
                "user": c.user,
                "attributes": [list(pair) for pair in c.attributes],
                "scenario": c.scenario,
                "history": [named(r) for r in c.history],
                "trigger": None if c.trigger is None else named(c.trigger),
                "query": c.query,
            },
            "instruction_source": self.instruction_source,
            "instruction": None
            if self.instruction is None
            else {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.instruction).items()},
            "evidence": [
                {
                    "tool": e.tool,
                    "sentence": e.sentence,
                    "items": [named(int(r)) | {"score": float(s)} for r, s in zip(e.items, e.scores, strict=True)],
                }
                | ({"details": e.details} if e.details else {})
                for e in self.evidence
            ],
            "beam": [named(r) | {"log_probability": float(p)} for r, p in self.beam],
            "fusion_weights": self.weights,
            "recommended": [
                {
                    "item": r.item,
                    "title": r.title,
                    "score": float(r.score),
                    "semantic_id": list(r.semantic_id),
                    "parts": r.parts,
                }
                for r in self.recommended
            ],
            "seconds": self.seconds,
            "note": self.note,
        }
