"""What one visitor of the page has chosen so far, and the request that it makes: no Gradio, no HTML here.

A history starts as a user's own or empty, and may then be edited. An edited history is nobody's: the request
leaves the user out, and with it the instruction that was stored for that user's own history; the profile stays.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from genrec.candidates import GENERATOR
from genrec.contracts import HOME, Instruction, Trace
from genrec.data.dataset import Dataset
from genrec.data.scenarios import SCENARIOS
from genrec.errors import GenrecError
from genrec.recommender import MAX_INSTRUCTION, Recommender
from genrec.tools import EBR, Controls, Tool
from ui.text import plain

MATCHES = 8
MAX_ITEMS = 50  # that one request may ask for


@dataclass(frozen=True)
class Session:
    """user: chosen from the data set, else None. history: catalogue rows, oldest first, as the page shows them.
    edited: the history is no longer that user's own. stored: the instruction stored for the user, as text, else ""."""

    user: str | None = None
    history: tuple[int, ...] = ()
    edited: bool = False
    stored: str = ""

    def add(self, row: int) -> Session:
        """One item more, as the newest."""
        return replace(self, history=(*self.history, row), edited=self.user is not None, stored="")

    def remove(self, position: int, row: int) -> Session:
        """Without the item at this position. Unchanged where another item stands there by now (a second click)."""
        if not 0 <= position < len(self.history) or self.history[position] != row:
            return self
        history = self.history[:position] + self.history[position + 1 :]
        return replace(self, history=history, edited=self.user is not None, stored="")


def begin(recommender: Recommender, user: str | None, scenario: str) -> Session:
    """The session of a user of the data set, or an empty one. Raises GenrecError for an unknown user."""
    user = (user or "").strip() or None
    if user is None:
        return Session()
    history = recommender.context(user=user, scenario=scenario).history
    return with_stored(recommender, Session(user, history), scenario)


def has_trigger(scenario: str) -> bool:
    """Whether requests of this scenario are about an item."""
    return scenario in SCENARIOS and SCENARIOS[scenario].trigger


def stored_instruction(recommender: Recommender, session: Session, scenario: str) -> Instruction | None:
    """What the recommender would find in the store for this session: of the scenario, else of home. None where the
    bundle has no text encoder to read it with."""
    if session.user is None or session.edited or recommender.bundle.config["embeddings"]:
        return None
    return recommender.stored(session.user, scenario)


def with_stored(recommender: Recommender, session: Session, scenario: str) -> Session:
    """The session with the text that is stored for it in this scenario."""
    found = stored_instruction(recommender, session, scenario)
    return replace(session, stored=plain(found.look_for, MAX_INSTRUCTION) if found else "")


@dataclass(frozen=True)
class Form:
    """All that the controls say. text: the instruction box. trigger: item identifier. weights: the sliders. alpha: how
    EBR's clusters are merged, None for the fitted one."""

    session: Session
    text: str = ""
    query: str = ""
    scenario: str = HOME
    trigger: str | None = None
    count: int = 10
    weights: Mapping[str, float] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def source(self) -> str:
        """Where the instruction of the request comes from: "given", "query", "stored" or "default". The trace says
        where a stored rewriting takes the place of what was typed."""
        text = self.text.strip()
        if text and text != self.session.stored.strip():
            return "given"
        if self.query.strip():
            return "query"
        return "stored" if text else "default"

    def follow(self, session: Session, newest: str | None) -> Form:
        """The form after the session changed: the trigger is the newest item again, and a box that still holds the
        old stored instruction holds the new one."""
        kept = self.text.strip() != self.session.stored.strip()
        return replace(self, session=session, text=self.text if kept else session.stored, trigger=newest)


def chosen_weights(recommender: Recommender, scenario: str) -> dict[str, float]:
    """The fusion weights of a scenario, chosen on validation, of every part: generator, tools, rankers."""
    bundle, fused = recommender.bundle, recommender.bundle.fusion(scenario)["fused"]
    return {name: float(fused.get(name, 0.0)) for name in (GENERATOR, *bundle.tools, *bundle.rankers)}


def ask(recommender: Recommender, form: Form) -> Trace:
    """The list that the form asks for, with its trace.

    An emptied instruction box means that the stored instruction is not wanted; the request says so by leaving the
    user out. Raises GenrecError.
    """
    given = form.text if form.source == "given" else None
    for name, text in (("instruction", given or ""), ("search text", form.query)):
        if len(text) > MAX_INSTRUCTION:
            raise GenrecError(f"the {name} has {len(text)} characters; at most {MAX_INSTRUCTION} are read")
    now, item = form.session, recommender.bundle.dataset.catalog.item
    own = now.user is not None and not now.edited
    sequences = recommender.bundle.dataset.sequences
    position = None if now.user is None else sequences.position(now.user)
    context = recommender.context(
        user=now.user if own else None,
        history=None if own else [item(row) for row in now.history],
        scenario=form.scenario,
        trigger=form.trigger if has_trigger(form.scenario) else None,
        query=form.query or None,
        attributes=() if position is None else sequences.attributes_of(position),  # an edited history is still theirs
    )
    if not form.text.strip():
        context = replace(context, user=None)
    weights = weights_given(form.weights, chosen_weights(recommender, form.scenario))
    tools: dict[str, Tool] = {}
    ebr = recommender.bundle.tools.get(EBR.name)
    if isinstance(ebr, EBR) and form.alpha not in (None, ebr.config.alpha):  # an untouched slider asks for nothing
        tools[EBR.name] = ebr.steered(Controls(alpha=form.alpha))
    return recommender.recommend(context, k=form.count, instruction=given, weights=weights, tools=tools)


def slider(weight: float) -> float:
    """A weight as a slider can show it."""
    return round(weight, 2)


def weights_given(shown: Mapping[str, float], chosen: Mapping[str, float]) -> dict[str, float] | None:
    """The weights to pass on; None while every slider stands where it started, so that the recommender decides.

    shown: the sliders. chosen: the weights they started from, which a slider that was not moved still means.
    Raises GenrecError where all are zero.
    """
    meant = {name: chosen[name] if value == slider(chosen[name]) else value for name, value in shown.items()}
    if meant == dict(chosen):
        return None
    if not any(meant.values()):
        raise GenrecError("every part has weight 0: raise at least one fusion weight")
    return meant


def fold(text: str) -> str:
    """Lower case without accents, for comparing what people type."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in decomposed if not unicodedata.combining(c))


class TitleIndex:
    """Finds items by parts of their titles; frequent items first, then the lower row."""

    def __init__(self, dataset: Dataset) -> None:
        counts = np.bincount(dataset.sequences.items, minlength=len(dataset.catalog))
        self._order = np.argsort(-counts, kind="stable").tolist()
        self._folded = [fold(title) for title in dataset.catalog.titles]

    def search(self, text: str, limit: int = MATCHES) -> list[int]:
        """Rows whose titles hold every typed word. Titles that start with the text come first, then those where
        every typed word starts a word, then the rest."""
        typed = fold(text[:200])
        words = typed.split()
        if not words:
            return []
        found: tuple[list[int], list[int], list[int]] = ([], [], [])
        for row in self._order:
            title = self._folded[row]
            if all(word in title for word in words):
                spaced = f" {title}"
                kind = 0 if title.startswith(typed.strip()) else 1 if all(f" {w}" in spaced for w in words) else 2
                found[kind].append(row)
        return [*found[0], *found[1], *found[2]][:limit]
