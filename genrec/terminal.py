"""What the command line shows: progress on stderr, tables and traces on stdout, JSON where it is asked for.

Item text comes from strangers: on its way to a terminal it loses control characters (an escape sequence could
rewrite the screen), is bounded, and is never read as rich's markup.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TITLE, CELL, SENTENCE = 60, 100, 300  # characters
PIPED_WIDTH = 140  # columns of a table that goes into a file or a pipe
COUNT = re.compile(r"^(?P<stage>[\w -]+): (?:\w+ )?(?P<done>[\d,]+) of (?P<total>[\d,]+)(?P<rest>.*)$")


def plain(value: object, limit: int = TITLE) -> str:
    """One printable line of at most `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


@contextlib.contextmanager
def only_ours_on_stdout() -> Iterator[None]:
    """Inside, whatever is written to stdout goes to stderr, C++ libraries' greetings too: stdout is for the result."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # started without a stdout
        yield
        return
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """A function that takes lines of progress. On a terminal "stage: 3 of 7, more" moves a bar and other lines stay;
    elsewhere every line is printed."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        yield lambda line: console.print(plain(line, SENTENCE), soft_wrap=True)
        return
    words = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
    bar = Progress(
        SpinnerColumn(),
        words,
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        expand=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task(title, total=None)

        def report(line: str) -> None:
            line = plain(line, SENTENCE)
            if found := COUNT.match(line):
                done, total = (int(found[name].replace(",", "")) for name in ("done", "total"))
                bar.update(task, description=found["stage"] + found["rest"], completed=done, total=total, refresh=True)
            else:
                console.print(line)
                bar.reset(task, total=None, description=title)

        yield report


def quiet_libraries() -> None:
    """Turns off the loading bars of transformers, sentence-transformers and others. To be called before they load."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextlib.contextmanager
def work(title: str) -> Iterator[Callable[[str], None]]:
    """Progress on stderr, and nobody else's words on stdout."""
    with only_ours_on_stdout(), progress(title) as report:
        yield report


def say(text: str) -> None:
    """One line on stdout."""
    _console().print(plain(text, SENTENCE), soft_wrap=True)


def show_json(value: Any) -> None:
    """Indented JSON on stdout; beyond ASCII only where stdout can take it."""
    wide = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not wide, allow_nan=False) + "\n")


def _console() -> Console:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process here
            raise BrokenPipeError

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Plain(markup=False, highlight=False, emoji=False, width=width)


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[object]], left: int = 1) -> Table:
    """Every cell is text, not markup; columns after the first `left` are numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(plain(title, SENTENCE), style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        show_header=any(columns),
    )
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if i < left else "right")
    for line in lines:
        table.add_row(*(Text(plain(cell, CELL)) for cell in line))
    return table


def show_data(found: Mapping[str, Any]) -> None:
    """A data set: counts, scenarios, splits, notes. found: as genrec.commands.describe makes it."""
    console = _console()
    counts = [(key.replace("_", " "), value) for key, value in found.items() if not isinstance(value, dict | list)]
    console.print(_table(f"Data set {found['name']}", ("", ""), counts[1:], left=2))
    rows = [(name, s["description"], s["requests"]) for name, s in found["scenarios"].items()]
    console.print(_table("Scenarios (test requests of leave-one-out)", ("scenario", "wanted", "requests"), rows, 2))
    rows = [
        (name, *(s.get(part, "-") for part in ("train", "validation", "test"))) for name, s in found["splits"].items()
    ]
    console.print(_table("Splits (events to train on, requests)", ("split", "train", "validation", "test"), rows))
    for name, split in found["splits"].items():
        if "error" in split:
            _line(console, f"{name}: not possible, {plain(split['error'], SENTENCE)}")
    _line(console, "Items, as the text embedder reads them:")
    for text in found["examples"]:
        _line(console, f"  {plain(text, SENTENCE)}")
    for name, note in found["notes"].items():
        _line(console, f"note on {plain(name)}: {plain(note, SENTENCE)}")


def show_report(report: Mapping[str, Any], slices: bool = False) -> None:
    """The table of a report (report.json) and the paired differences; slices: the others than "all" too."""
    console, shown = _console(), ("HR@10", "NDCG@10")

    def cell(interval: Mapping[str, float | None] | None, sign: str = "") -> str:
        if interval is None:
            return "-"
        mean, low, high = (interval[key] for key in ("mean", "low", "high"))
        return f"{mean:{sign}.4f}" + (f" [{low:{sign}.4f}, {high:{sign}.4f}]" if low is not None else "")

    names = list(dict.fromkeys(r["slice"] for r in report["rows"])) if slices else ["all"]
    for name in names:
        rows = [r for r in report["rows"] if r["slice"] == name]
        lines = [(r["system"], *(cell(r["metrics"].get(m)) for m in (*shown, "coverage"))) for r in rows]
        title = f"{report['title']}: {name}, {max((r['requests'] for r in rows), default=0):,} requests"
        console.print(_table(title, ("system", *shown, "coverage"), lines))
        pairs = [c for c in report["comparisons"] if c["slice"] == name]
        lines = [
            (f"{c['system']} - {c['baseline']}", *(cell(c["differences"].get(m), "+") for m in shown)) for c in pairs
        ]
        if lines:
            console.print(_table("Paired differences", ("pair", *shown), lines))
    console.print(
        "Means with 95 % intervals from a bootstrap over users. " + plain(report["about"]["protocol"], SENTENCE)
    )


def show_list(trace: Mapping[str, Any]) -> None:
    """The recommended items of a trace (Trace.as_dict), with what each part said of them."""
    console, weights = _console(), trace["fusion_weights"]
    parts = [name for name, weight in weights.items() if weight]
    lines = [
        (place, r["item"], r["title"], f"{r['score']:.2f}", *(f"{r['parts'].get(p, 0):.2f}" for p in parts))
        for place, r in enumerate(trace["recommended"], start=1)
    ]
    _line(console, _request(trace))
    _line(console, _told(trace))
    console.print(_table("Recommended", ("", "item", "title", "score", *map(plain, parts)), lines, left=3))
    if not lines:
        _line(console, "Nothing is left to recommend: every item was seen, or the filters leave none.")


def show_trace(trace: Mapping[str, Any]) -> None:
    """A whole trace (Trace.as_dict): request, instruction, tools, beam, weights, result, time."""
    console = _console()
    show_list(trace)
    weights = ", ".join(f"{plain(name)} {weight:g}" for name, weight in trace["fusion_weights"].items())
    _line(console, f"Fusion weights: {weights or 'none'}" + (f"; {trace['note']}" if trace["note"] else "") + "\n")
    if known := trace["context"]["attributes"]:
        said_of = ", ".join(f"{plain(name)} {plain(value)}" for name, value in known)
        _line(console, f"Profile: {said_of}\n")
    if instruction := trace["instruction"]:
        for key in ("situation", "intents", "look_for", "rationale", "model", "prompt_version"):
            value = instruction.get(key)
            text = "; ".join(map(str, value)) if isinstance(value, list) else value
            if text:
                _line(console, f"  {key.replace('_', ' ')}: {plain(text, SENTENCE)}")
        console.print()
    for said in trace["evidence"]:
        _line(console, f"Tool {plain(said['tool'])}: {plain(said['sentence'], SENTENCE)}")
        for found in said["items"]:
            _line(console, f"  {found['score']:10.4g}  {plain(found['title'])}")
    lines = [(place, b["title"], f"{b['log_probability']:.3f}") for place, b in enumerate(trace["beam"], start=1)]
    console.print()
    console.print(_table("The generator's own list", ("", "title", "log-probability"), lines, left=2))
    _line(console, "Seconds: " + ", ".join(f"{plain(name)} {s:.3f}" for name, s in trace["seconds"].items()))


def show_evidence(found: Mapping[str, Any]) -> None:
    """What one tool says (genrec.commands.tool): sentence, items, and how it came to them where it tells."""
    console, details = _console(), found["details"] or {}
    _line(console, f"Tool {plain(found['tool'])}: {plain(found['sentence'], SENTENCE)}")
    lines = [(place, i["item"], i["title"], f"{i['score']:.4g}") for place, i in enumerate(found["items"], start=1)]
    console.print(_table("Items", ("", "item", "title", "score"), lines, left=3))
    if clusters := details.get("clusters"):
        shares = [(c["cluster"], c["label"], f"{c['share']:.1%}", c["items"], c["history"]) for c in clusters]
        title, columns = f"Clusters, alpha {details['alpha']:g}", ("", "cluster", "share", "items", "in history")
        console.print(_table(title, columns, shares, left=2))
    if routes := details.get("routes"):
        asked = [
            (r["trigger"], r["channel"], f"{r['value']:.3f}", "-" if r["unique"] is None else f"{r['unique']:.3f}")
            for r in routes
        ]
        title = f"Routes, policy {plain(details['policy'])}, quota {details['quota']}"
        console.print(_table(title, ("trigger", "channel", "value", "uniqueness"), asked, left=2))


def _request(trace: Mapping[str, Any]) -> str:
    context = trace["context"]
    who = "an unknown user" if context["user"] is None else f"user {plain(context['user'])}"
    newest = "; ".join(plain(item["title"], 40) for item in context["history"][:-4:-1])
    parts = [f"For {who}, scenario {plain(context['scenario'])}, {len(context['history'])} items of history"]
    parts += [f"newest: {newest}"] if newest else []
    parts += [f"on the page of {plain(context['trigger']['title'])}"] if context["trigger"] else []
    parts += [f"searching for {plain(context['query'])!r}"] if context["query"] else []
    return ", ".join(parts)


def _told(trace: Mapping[str, Any]) -> str:
    instruction = trace["instruction"]
    if instruction is None:
        return "Instruction: none, the generator follows what it learned by default"
    return f"Instruction ({plain(trace['instruction_source'])}): look for {plain(instruction['look_for'], SENTENCE)}"
