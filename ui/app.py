"""The page: choose a user or build a history, choose the scenario, steer with words and weights, see the whole trace.

    from ui.app import launch
    launch("bundle")                      # http://127.0.0.1:7860

`build` wires the components of ui.layout to the functions of ui.session (what is asked) and of ui.render and
ui.trace (what is shown). What a visitor chose lives in one gr.State; nothing is kept between sessions, and nothing
is loaded from elsewhere. The list follows every choice at once; typed text is taken with Enter or the button.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from genrec.errors import GenrecError, missing_package
from genrec.recommender import Recommender
from genrec.tools import EBR
from ui import render
from ui.rankers import Ranker
from ui.session import (
    Form,
    Session,
    TitleIndex,
    ask,
    begin,
    chosen_weights,
    has_trigger,
    slider,
    stored_instruction,
    with_stored,
)
from ui.text import plain
from ui.trace import trace_view

try:
    import gradio as gr

    from ui.layout import Layout, place
except ImportError as problem:
    raise missing_package("gradio", "ui") from problem

TRIGGERS = 50  # newest items of the history that may be the trigger
# In one column the list stands below the controls: the button leads there.
TO_THE_LIST = "() => { if (innerWidth < 760) document.getElementById('results').scrollIntoView({behavior: 'smooth'}) }"
SHOW_WEIGHTS = """() => {
  document.getElementById('more').ariaExpanded = document.getElementById('weights').toggleAttribute('data-open') }"""
Change = dict[Any, Any]  # component -> its new value
STYLE = Path(__file__).with_name("style.css")


def build(recommender: Recommender, rankers: Sequence[Ranker] = ()) -> gr.Blocks:
    """The page over one recommender. It opens on the first user of the data set; `serve` shows it. rankers: whose view
    of each list the trace shows, beside that of the bundle's own."""
    catalog = recommender.bundle.dataset.catalog
    rankers = [*(Ranker.beside(tool, catalog) for tool in recommender.bundle.rankers.values()), *rankers]
    weights = {name: chosen_weights(recommender, name) for name in recommender.bundle.dataset.scenarios}
    with gr.Blocks(title="genrec", analytics_enabled=False) as page:
        ebr = recommender.bundle.tools.get(EBR.name)
        parts = place(recommender.bundle.dataset, weights, None if ebr is None else ebr.config.alpha)
        _wire(page, parts, recommender, rankers)
    return page


def launch(
    bundle_path: Path | str,
    host: str = "127.0.0.1",
    port: int = 7860,
    instructions: Path | str | None = None,
    rankers: Sequence[Path] = (),
) -> None:
    """Serves the page over a bundle until it is interrupted. instructions: see Bundle.load. rankers: folders that
    `genrec rank ... fit` made. Raises GenrecError (bad bundle or ranker, port in use)."""
    recommender = Recommender.load(bundle_path, instructions)
    tools = [Ranker.open(folder, recommender.bundle.dataset.catalog) for folder in rankers]
    serve(recommender, host, port, rankers=tools)


def serve(
    recommender: Recommender, host: str, port: int, wait: bool = True, rankers: Sequence[Ranker] = ()
) -> gr.Blocks:
    """Starts the page's server; with wait False it returns while the server runs (`close()` ends it).

    A first search is made before the server starts, so that nobody waits for the model or the text encoder, and what
    is wrong with a bundle is said here.
    """
    page, users = build(recommender, rankers), recommender.bundle.dataset.sequences.users
    words = "" if recommender.bundle.config["embeddings"] else "anything"  # a bundle of own embeddings reads no text
    context = recommender.context(users[0] if users else None, None if users else [], query=words)
    recommender.recommend(context, k=1)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=not wait,
            quiet=not wait,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css=STYLE.read_text(encoding="utf-8"),
        )
    except OSError as error:
        raise GenrecError(f"cannot serve the page on {host}:{port} ({error}); choose another port") from error
    return page


def theme() -> gr.themes.Base:
    """Sober: one accent, greys, and the fonts that Gradio's package carries (its semi-bold lacks letters)."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="zinc",
        radius_size="sm",
        font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
        font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )


def _wire(page: gr.Blocks, at: Layout, recommender: Recommender, rankers: Sequence[Ranker]) -> None:
    """Every event of the page. Handlers return {component: new value}."""
    catalog, index = recommender.bundle.dataset.catalog, TitleIndex(recommender.bundle.dataset)

    def read(values: tuple[Any, ...]) -> Form:
        now, text, query, scenario, trigger, count, *rest = values
        weights, alpha = rest[: len(at.weights)], rest[len(at.weights) :]
        shown = dict(zip(at.weights, weights, strict=True))
        return Form(now, text, query, scenario, trigger, int(count), shown, float(alpha[0]) if alpha else None)

    def answer(form: Form) -> Change:
        """The list and its trace, or what is wrong for the visitor as one line in their place."""
        try:
            trace = ask(recommender, form)
        except GenrecError as wrong:
            return refuse(wrong)
        return {
            at.notice: "",
            at.listed: render.recommendations(trace, catalog),
            at.traced: trace_view(trace, catalog, rankers),
        }

    def refuse(wrong: GenrecError) -> Change:
        return {at.notice: render.error(str(wrong)), at.listed: "", at.traced: ""}

    def note(form: Form) -> Change:
        """The line under the instruction box."""
        stored = stored_instruction(recommender, form.session, form.scenario) if form.source == "stored" else None
        return {at.told: render.told(form.source, stored.situation if stored else "")}

    def change(form: Form, session: Session) -> Change:
        """All that follows from another session or scenario."""
        recent = list(dict.fromkeys(reversed(session.history)))[:TRIGGERS]
        choices = [(plain(catalog.title(row)), catalog.item(row)) for row in recent]
        newest = choices[0][1] if choices else None
        form = form.follow(session, newest)
        return {
            at.session: session,
            at.history: render.history_list(session, catalog),
            at.trigger: gr.Dropdown(choices, value=newest, visible=has_trigger(form.scenario)),
            at.instruction: form.text,
            at.about: render.scenario_line(form.scenario),
            **note(form),
            **answer(form),
        }

    def clicked_row(event: gr.EventData) -> int:
        """The row that a clicked button names, checked: an event comes from outside."""
        row = event._data.get("row") if isinstance(event._data, dict) else None
        if not isinstance(row, int) or not 0 <= row < len(catalog):
            raise GenrecError("the catalogue has no such item; reload the page")
        return row

    def choose(form: Form, user: str | None) -> Change:
        return change(form, begin(recommender, user, form.scenario))

    def move(form: Form) -> Change:
        form, moved = restart(form)
        return change(form, with_stored(recommender, form.session, form.scenario)) | moved

    def empty(form: Form) -> Change:
        return change(form, Session()) | {at.user: None}

    def add(form: Form, event: gr.EventData) -> Change:
        return change(form, form.session.add(clicked_row(event))) | {at.search: "", at.found: ""}

    def add_first(form: Form, typed: str) -> Change:
        rows = index.search(typed, limit=1)
        return change(form, form.session.add(rows[0])) | {at.search: "", at.found: ""} if rows else {}

    def remove(form: Form, event: gr.EventData) -> Change:
        row, position = clicked_row(event), event._data.get("position")
        return change(form, form.session.remove(position if isinstance(position, int) else -1, row))

    def restart(form: Form) -> tuple[Form, Change]:
        """The form with the weights of its scenario, and the sliders that show them."""
        start = {name: slider(exact) for name, exact in chosen_weights(recommender, form.scenario).items()}
        return replace(form, weights=start), {at.weights[name]: w for name, w in start.items()}

    def back(form: Form) -> Change:
        form, moved = restart(form)
        return moved | answer(form)

    controls: list[Any] = [at.session, at.instruction, at.query, at.scenario, at.trigger, at.count]
    controls += at.weights.values()
    controls += [] if at.alpha is None else [at.alpha]
    results: list[Any] = [at.notice, at.listed, at.traced]
    session: list[Any] = [at.session, at.history, at.trigger, at.instruction, at.about, at.told]
    session += [at.user, at.search, at.found]

    def on(
        event: Callable[..., Any],
        handler: Callable[..., Change],
        outputs: list[Any],
        extra: Any = None,
        clicked: bool = False,
        **more: Any,
    ) -> None:
        """Runs handler(form[, value of extra][, event]) at this event; GenrecError becomes a line on the page.

        One after the other, in the order in which they were asked: a slow answer never comes after a newer one.
        """

        def run(data: gr.EventData, *values: Any) -> Change:
            form = read(values[: len(controls)])
            try:
                return handler(form, *values[len(controls) :], *([data] if clicked else []))
            except GenrecError as wrong:
                return refuse(wrong)

        inputs = controls + ([] if extra is None else [extra])
        more = {"show_progress": "hidden", "concurrency_id": "page", "concurrency_limit": 1, **more}
        event(run, inputs, outputs, api_visibility="private", **more)

    on(page.load, choose, session + results, at.user)
    on(at.user.input, choose, session + results, at.user)
    on(at.scenario.input, move, [*at.weights.values(), *session, *results])
    on(at.clear.click, empty, session + results)
    on(at.found.click, add, session + results, clicked=True)
    on(at.search.submit, add_first, session + results, at.search)
    on(at.history.click, remove, session + results, clicked=True)
    at.go.click(None, None, None, js=TO_THE_LIST)
    at.more.click(None, None, None, js=SHOW_WEIGHTS)
    # One listener for all of them: while a list is made a further wish waits, and is then read from the controls anew,
    # so the last list is of what the controls say.
    asking = [at.go.click, at.instruction.submit, at.query.submit, at.trigger.input, at.count.release]
    asking += [weight.release for weight in at.weights.values()]
    asking += [] if at.alpha is None else [at.alpha.release]
    on(partial(gr.on, asking), answer, results, trigger_mode="always_last", show_progress="minimal")
    for box in (at.instruction, at.query):  # `input` would miss what is pasted or typed on a phone
        on(box.change, note, [at.told, *results], trigger_mode="always_last")
    on(at.reset.click, back, [*at.weights.values(), *results])
    at.search.change(
        lambda typed: render.matches(index.search(typed), typed, catalog),
        at.search,
        at.found,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )
