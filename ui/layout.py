"""The components of the page and where they stand: controls left, results right; one column on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gradio as gr

from genrec.contracts import HOME
from genrec.data.dataset import Dataset
from genrec.recommender import MAX_INSTRUCTION
from ui import render
from ui.session import MAX_ITEMS, Session, slider
from ui.text import counted, plain

USERS = 1000  # offered in the list; any other user of the data set may be typed
TYPED = 200  # characters of a title search
MAX_ALPHA = 3.0
# A click on a button inside the HTML becomes an event with the row, and the position, that the button names.
PICK = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-row]');
  if (button) trigger('click', {row: Number(button.dataset.row), position: Number(button.dataset.position ?? -1)});
});"""


@dataclass(frozen=True)
class Layout:
    """Every component that an event reads or writes."""

    session: gr.State
    user: gr.Dropdown
    search: gr.Textbox
    found: gr.HTML
    history: gr.HTML
    clear: gr.Button
    scenario: gr.Radio
    about: gr.HTML
    trigger: gr.Dropdown
    query: gr.Textbox
    instruction: gr.Textbox
    told: gr.HTML
    more: gr.Button
    count: gr.Slider
    weights: dict[str, gr.Slider]
    alpha: gr.Slider | None
    reset: gr.Button
    go: gr.Button
    notice: gr.HTML
    listed: gr.HTML
    traced: gr.HTML


def place(dataset: Dataset, weights: Mapping[str, Mapping[str, float]], alpha: float | None = None) -> Layout:
    """The components, inside an open gr.Blocks. weights: by scenario and part, what the sliders start from; alpha: the
    same for EBR's merge, None where the bundle has no EBR. It starts at the first user."""
    _html("top", render.header(dataset))
    notice = _html("notice")
    with gr.Row(elem_id="columns"):
        with gr.Column(scale=5, min_width=320, elem_id="controls"):
            who = _who(dataset)
            where = _where(dataset)
            with gr.Group():
                instruction = gr.Textbox(
                    label="Instruction",
                    placeholder="What to look for, in your own words",
                    max_lines=5,
                    max_length=MAX_INSTRUCTION,
                    elem_id="instruction",
                )
                told = _html("told")
            go = gr.Button("Recommend", variant="primary", elem_id="go")
            # No gr.Accordion: it draws its content when it first opens, and by that undoes what is typed at once.
            more = gr.Button("Number of items and fusion weights", size="sm", elem_id="more")
            with gr.Column(elem_id="weights"), gr.Group():
                count = gr.Slider(1, MAX_ITEMS, 10, step=1, label="Number of items", buttons=[], elem_id="count")
                sliders = {
                    name: gr.Slider(
                        0,
                        max(3.0, *(2 * slider(of[name]) for of in weights.values())),
                        slider(w),
                        step=0.01,
                        label=plain(name),
                        elem_id=f"weight-{i}",
                    )
                    for i, (name, w) in enumerate(weights[HOME].items())
                }
                spread = None
                if alpha is not None:
                    label = "EBR: alpha (0 spreads over its clusters, more follows the user)"
                    most = max(MAX_ALPHA, alpha)
                    spread = gr.Slider(0, most, alpha, step=0.05, label=label, buttons=[], elem_id="alpha")
                reset = gr.Button("Back to the weights chosen on validation", size="sm", elem_id="reset")
        with gr.Column(scale=9, min_width=320, elem_id="results"):
            listed = _html("listed")
            traced = _html("traced")
    return Layout(
        gr.State(Session()),
        *who,
        *where,
        instruction,
        told,
        more,
        count,
        sliders,
        spread,
        reset,
        go,
        notice,
        listed,
        traced,
    )


def _html(name: str, value: str = "", pick: bool = False) -> gr.HTML:
    """A place for HTML of ui.render. pick: clicks on its buttons become events."""
    return gr.HTML(
        value, elem_id=name, elem_classes="genrec", apply_default_css=False, js_on_load=PICK if pick else None
    )


def _who(dataset: Dataset) -> tuple[gr.Dropdown, gr.Textbox, gr.HTML, gr.HTML, gr.Button]:
    people = zip(dataset.sequences.users, dataset.sequences.lengths.tolist(), strict=True)
    offered = [(f"{plain(u)} ({counted(n, 'item')})", u) for u, n in people if n][:USERS]
    with gr.Group():
        user = gr.Dropdown(
            offered,
            value=offered[0][1] if offered else None,
            label="User of the data set",
            allow_custom_value=True,
            elem_id="user",
        )
        history = _html("history", pick=True)
        search = gr.Textbox(
            label="Add to the history",
            placeholder="Type a few letters of a title",
            max_length=TYPED,
            elem_id="search",
        )
        found = _html("found", pick=True)
        clear = gr.Button("Start with an empty history", size="sm", elem_id="clear")
    return user, search, found, history, clear


def _where(dataset: Dataset) -> tuple[gr.Radio, gr.HTML, gr.Dropdown, gr.Textbox]:
    names = list(dataset.scenarios)
    with gr.Group():
        scenario = gr.Radio(names, value=names[0], label="Scenario", elem_id="scenario")
        about = _html("about")
        trigger = gr.Dropdown([], label="Trigger: the item whose page it is", visible=False, elem_id="trigger")
        query = gr.Textbox(
            label="Search text",
            placeholder="What the user searches for, if anything",
            max_length=MAX_INSTRUCTION,
            elem_id="query",
        )
    return scenario, about, trigger, query
