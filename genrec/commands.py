"""What each `genrec` command does, from parsed flags to what it shows. Heavy imports stand where they are used."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec import terminal
from genrec.contracts import HOME
from genrec.errors import GenrecError, missing_package

if TYPE_CHECKING:
    from genrec.contracts import Trace, UserContext
    from genrec.data import Dataset
    from genrec.recommender import Recommender
    from genrec.tools import Tool
    from serving.instruct import InstructReport
    from serving.llm import Backend

DEMO_BUNDLE = Path("bundles/ml-100k")
DEMO_FIT: dict[str, Any] = {"data": "ml-100k", "epochs": 16}  # and what differs from the defaults of FitConfig
DEMO_USERS = 64  # who get an instruction: one batch
PROMPT = "intent_v2"  # of a model that is no adapter with a prompt of its own
REWRITE = "rewrite_v1"  # of search texts


def demo(args: argparse.Namespace) -> None:
    """Fits the bundle unless it is there, has instructions written, shows table and trace, starts the page."""
    from genrec.recommender import Recommender
    from training.config import FitConfig

    if not args.no_ui:
        _need_gradio()
    with terminal.work("demo") as report:
        if (args.bundle / "bundle.json").is_file():
            report(f"{args.bundle} is there from before")
        else:
            from training.fit import fit as make

            make(FitConfig(out=args.bundle, **DEMO_FIT), report)
        recommender = Recommender.load(args.bundle, args.store)
        users = recommender.bundle.dataset.sequences.users
        asked = [recommender.context(user=user) for user in users[: args.users]]
        write_instructions(recommender, asked, prompt_of(args), model_of(args, report), report)
        found = recommender.recommend(recommender.context(user=users[0]), k=10)
    terminal.show_report(_stored_report(args.bundle))
    terminal.show_trace(found.as_dict(recommender.bundle.dataset.catalog))
    if not args.no_ui:
        from ui.app import serve

        serve(recommender, args.host, args.port)


def data(args: argparse.Namespace) -> None:
    """Loads a data source, which checks it, and describes it."""
    from genrec.data import load_dataset, save_dataset
    from genrec.io import check_writable

    with terminal.work("reading") as report:
        if args.save:
            check_writable(args.save)
        dataset = load_dataset(args.source)
        if args.save:
            save_dataset(dataset, args.save)
            report(f"saved to {args.save}")
        found = describe(dataset)
    (terminal.show_json if args.json else terminal.show_data)(found)


def describe(dataset: Dataset) -> dict[str, Any]:
    """What `genrec data` shows of a data set, JSON-ready."""
    import numpy as np

    from genrec.data import SCENARIOS, chronological, eval_set, leave_one_out, rolling

    s, catalog = dataset.sequences, dataset.catalog
    rated = s.ratings[~np.isnan(s.ratings)]
    splits: dict[str, dict[str, Any]] = {}
    wanted: dict[str, int] = {}
    for name, make in (("leave-one-out", leave_one_out), ("rolling", rolling), ("chronological", chronological)):
        try:
            split = make(dataset)
        except GenrecError as error:
            splits[name] = {"error": str(error)}
            continue
        sizes = {"train": split.train.events, "validation": len(split.validation), "test": len(split.test)}
        splits[name] = sizes | {"note": split.note}
        if name == "leave-one-out":
            of = {n: eval_set(split.test, SCENARIOS[n], dataset, split.train) for n in dataset.scenarios}
            wanted = {n: len(requests) for n, requests in of.items()}
    order = np.lexsort((s.times, s.items, s.user_of))
    same_user = np.diff(s.user_of[order]) == 0
    again = same_user & (np.diff(s.items[order]) == 0) & (np.diff(s.times[order]) == 0)
    tied = (np.diff(s.user_of) == 0) & (np.diff(s.times) == 0)
    days = [time.strftime("%Y-%m-%d", time.gmtime(float(t))) for t in (s.times.min(), s.times.max())]
    return {
        "name": dataset.name,
        "users": len(s),
        "items": len(catalog),
        "events": s.events,
        "density": round(s.events / (len(s) * len(catalog)), 6),
        "events_per_user": f"{s.lengths.min()} to {s.lengths.max()}, median {np.median(s.lengths):g}",
        "first_day": days[0],
        "last_day": days[1],
        "rated_events": len(rated),
        "duplicate_events": int(again.sum()),  # same user, item and time as another; kept
        "tied_events": int(tied.sum()),  # same time as the user's event before
        "items_with_title": sum(bool(t) for t in catalog.table["title"].to_pylist()),
        "items_with_category": sum(bool(path) for path in catalog.categories),
        "further_fields": ", ".join(catalog.fields) or "none",
        "scenarios": {
            n: {"description": SCENARIOS[n].description, "requests": wanted.get(n, 0)} for n in dataset.scenarios
        },
        "splits": splits,
        "examples": catalog.texts[:3],
        "notes": dataset.notes,
    }


def fit(args: argparse.Namespace) -> None:
    """Makes a bundle from the flags."""
    from training.config import FitConfig

    config = FitConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(FitConfig)})
    clock = time.perf_counter()
    with terminal.work("fit") as report:
        from training.fit import fit as make

        folder = make(config, report)
    if args.json:
        terminal.show_json(
            {"bundle": str(folder), "seconds": round(time.perf_counter() - clock, 1), "settings": config.as_dict()}
        )
        return
    terminal.show_report(_stored_report(folder))
    terminal.say(f"{folder} is ready: genrec recommend --bundle {folder} --user ID, or genrec ui --bundle {folder}")


def align(args: argparse.Namespace) -> None:
    """Makes an aligned bundle from the flags."""
    from training.align_config import AlignConfig

    config = AlignConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(AlignConfig)})
    clock = time.perf_counter()
    with terminal.work("align") as report:
        from training.align import align as make

        folder = make(config, report)
    if args.json:
        seconds = round(time.perf_counter() - clock, 1)
        terminal.show_json({"bundle": str(folder), "seconds": seconds, "settings": config.as_dict()})
        return
    terminal.show_report(_stored_report(folder))
    terminal.say(f"{folder} is ready: genrec recommend --bundle {folder} --user ID, or genrec ui --bundle {folder}")


def instruct(args: argparse.Namespace) -> None:
    """Runs the near-line batch job over users of a bundle."""
    if twice := [user for i, user in enumerate(args.user or []) if user in args.user[:i]]:
        raise GenrecError(f"user {twice[0]!r} is given twice; name each once")
    with terminal.work("instruct") as report:
        from serving.instruct import CHUNK, in_shard

        recommender = _load(args)
        store = recommender.bundle.store
        shard, shards = args.shard
        if args.queries:
            prompt = rewriting_prompt(recommender, args)
            asked = [c for c in searches(args.queries) if in_shard(c.user or "", shard - 1, shards)]
        else:
            users, prompt = args.user or recommender.bundle.dataset.sequences.users[: args.users], prompt_of(args)
            mine = [user for user in users if in_shard(user, shard - 1, shards)]
            asked = [recommender.context(user=user, scenario=args.scenario) for user in mine]
        if args.expire is not None:
            report(f"{store.expire(time.time() - args.expire):,} old instructions expired")
        chunk = max(CHUNK, 2 * args.concurrency) if args.endpoint else CHUNK
        done = write_instructions(recommender, asked, prompt, model_of(args, report), report, chunk)
    if args.json:
        terminal.show_json(done.as_dict() | {"stored": store.count()})
        return
    terminal.say(done.line())
    for context in asked[:3]:
        if found := store.get(context.user or "", context.scenario):
            terminal.say(f"for {context.user}: {found.look_for} (written by {found.model})")


def rewriting_prompt(recommender: Recommender, args: argparse.Namespace) -> str:
    """The prompt for search texts. Raises GenrecError where a rewriting could not be followed, or would be asked of a
    model that was taught another prompt."""
    from serving import models

    if args.scenario != "home":
        raise GenrecError("search texts are no user's: leave --scenario out beside --queries")
    if recommender.bundle.config["embeddings"]:
        raise GenrecError("this bundle was fitted with own embeddings and cannot read text, so no rewriting either")
    own, prompt = models.prompt_of(args.model), args.prompt or REWRITE
    if own and own != prompt:
        raise GenrecError(f"{args.model} was taught the prompt {own}; rewrite search texts with another --model")
    return prompt


def searches(path: Path) -> list[UserContext]:
    """A context for each search text of a file, one a line; the same text once. Raises GenrecError."""
    from genrec.contracts import UserContext
    from genrec.instructions.store import query_key

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GenrecError(f"{path} cannot be read as search texts, one a line ({error})") from None
    keys = dict.fromkeys(query_key(line) for line in lines)
    found = [UserContext(user=text, scenario=kind, query=text) for text, kind in keys if text]
    if not found:
        raise GenrecError(f"{path} holds no search text; write one a line")
    return found


def worker(args: argparse.Namespace) -> None:
    """Runs the near-line worker until it is interrupted, or for one round."""
    with terminal.work("worker") as report:
        import prompts
        from serving.instruct import CHUNK, tool_evidence
        from serving.worker import Interactions, Worker, WorkerConfig

        bundle = _load(args).bundle
        catalog, scenarios = bundle.dataset.catalog, tuple(dict.fromkeys(args.scenario or ["home"]))
        if unknown := [name for name in scenarios if name not in bundle.dataset.scenarios]:
            known = ", ".join(bundle.dataset.scenarios)
            raise GenrecError(f"unknown scenario {unknown[0]!r}; this bundle has: {known}")
        config = WorkerConfig(
            scenarios,
            args.window,
            args.max_age,
            args.expire,
            args.tokens,
            args.every,
            chunk=max(CHUNK, 2 * args.concurrency) if args.endpoint else CHUNK,
        )
        template, evidence = prompts.load(prompt_of(args)), tool_evidence(bundle)
        keeper = Worker(catalog, template, bundle.store, model_of(args, report), config, evidence, report)
        with interrupted_by(signal.SIGTERM):
            done = keeper.run(
                Interactions(args.data or bundle.config["data"], catalog, report, bundle.dataset.sequences), args.once
            )
    if args.json:
        terminal.show_json(done.as_dict() | {"stored": bundle.store.count()})
    else:
        terminal.say(done.line())


@contextlib.contextmanager
def interrupted_by(number: signal.Signals) -> Iterator[None]:
    """Inside, this signal ends the work as Ctrl-C does: claims and engines are let go."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def model_of(args: argparse.Namespace, report: Callable[[str], None]) -> Callable[..., Backend]:
    """What opens the language model that the flags of `_model` in cli.py describe, for about so many texts."""

    def make(texts: int = 0) -> Backend:
        from serving.llm import open_model

        return open_model(
            args.backend,
            args.model,
            report=report,
            endpoint=args.endpoint,
            concurrency=args.concurrency,
            texts=texts,
        )

    return make


def prompt_of(args: argparse.Namespace) -> str:
    """The prompt that was asked for, else the one that an adapter was trained with, else PROMPT."""
    from serving import models

    return getattr(args, "prompt", None) or models.prompt_of(args.model) or PROMPT


def write_instructions(
    recommender: Recommender,
    asked: list[UserContext],
    prompt: str,
    open_engine: Callable[[int], Backend],
    report: Callable[[str], None],
    chunk: int = 64,
) -> InstructReport:
    """Instructions for these contexts, with the tools' evidence; the model starts only if one is missing or stale."""
    import prompts
    from genrec.instructions import has_content
    from serving.instruct import InstructReport, instruct, stale, tool_evidence

    bundle, template = recommender.bundle, prompts.load(prompt)
    if any(context.query for context in asked) and "query" not in template.asks:
        raise GenrecError(f"the prompt {prompt} does not show what was typed; use --prompt {REWRITE}")
    able = [context for context in asked if has_content(context, template)]
    waiting = stale(able, bundle.dataset.catalog, template, bundle.store)
    if not waiting:
        report(f"instructions: {len(able)} are up to date")
        return InstructReport(len(asked), current=len(able), empty=len(asked) - len(able))
    bundle.store.put_many(())  # say so before the model starts, where it cannot be written
    engine = open_engine(len(waiting))
    try:
        evidence = tool_evidence(bundle) if template.sentences or template.proposals else None
        return instruct(asked, bundle.dataset.catalog, engine, template, bundle.store, chunk, evidence, report)
    finally:
        engine.close()


def recommend(args: argparse.Namespace) -> None:
    """Prints one list."""
    recommender, found = _ask(args)
    whole = found.as_dict(recommender.bundle.dataset.catalog)
    if args.json:
        short = {key: whole["context"][key] for key in ("user", "scenario", "trigger", "query")}
        told = whole["instruction"] and whole["instruction"]["look_for"]
        short |= {"instruction": told, "instruction_source": whole["instruction_source"]}
        terminal.show_json(short | {"recommended": whole["recommended"]})
    else:
        terminal.show_list(whole)


def trace(args: argparse.Namespace) -> None:
    """Prints one list and everything that led to it."""
    recommender, found = _ask(args)
    (terminal.show_json if args.json else terminal.show_trace)(found.as_dict(recommender.bundle.dataset.catalog))


def tool(args: argparse.Namespace) -> None:
    """Prints what one tool says of a request."""
    with terminal.work("asking"):
        recommender = _load(args)
        tools, catalog = recommender.bundle.tools, recommender.bundle.dataset.catalog
        if args.name not in tools:
            raise GenrecError(f"this bundle has no tool {args.name!r}; it has: {', '.join(tools)}")
        context = recommender.context(args.user, args.history, trigger=args.trigger, query=args.query)
        (found,) = steered(tools[args.name], args).retrieve([context], args.k)
    items = [
        {"item": catalog.item(int(row)), "title": catalog.title(int(row)), "score": float(score)}
        for row, score in zip(found.items, found.scores, strict=True)
    ]
    whole = {"tool": found.tool, "sentence": found.sentence, "items": items, "details": found.details}
    if args.json:
        vector = None if found.vector is None else [round(float(x), 6) for x in found.vector]
        terminal.show_json(whole | {"vector": vector})
    else:
        terminal.show_evidence(whole)


def steered(chosen: Tool, args: argparse.Namespace) -> Tool:
    """The tool under the controls of the command line. Raises GenrecError for a control that it does not have."""
    from genrec.tools import CAPTS, EBR, Controls

    given = [name for name in ("alpha", "quota", "floor", "policy") if getattr(args, name) is not None]
    if isinstance(chosen, EBR) and args.policy is None:
        quotas, floors = (_counts(name, getattr(args, name) or []) for name in ("quota", "floor"))
        return chosen.steered(Controls(args.alpha, quotas, floors))
    if isinstance(chosen, CAPTS) and args.alpha is None and args.floor is None:
        changes: dict[str, Any] = {} if args.policy is None else {"policy": args.policy}
        if args.quota:
            if not args.quota[-1].isdecimal() or not int(args.quota[-1]):
                raise GenrecError(f"--quota {args.quota[-1]}: capts takes a number of pairs, such as --quota 12")
            changes["quota"] = int(args.quota[-1])
        return chosen.steered(**changes)
    if given:
        raise GenrecError(f"{chosen.name} cannot be asked with --{given[0]}: leave it out")
    return chosen


def _counts(flag: str, said: list[str]) -> dict[str, int]:
    """{"nail polish": 3} out of ["nail polish=3"]."""
    out = {}
    for text in said:
        name, _, count = text.rpartition("=")
        if not name or not count.isdecimal():
            raise GenrecError(f"--{flag} {text}: ebr takes CLUSTER=N, a label or number of a cluster and a count")
        out[name] = int(count)
    return out


def _load(args: argparse.Namespace) -> Recommender:
    from genrec.recommender import Recommender

    return Recommender.load(args.bundle, args.store)


def _ask(args: argparse.Namespace) -> tuple[Recommender, Trace]:
    with terminal.work("recommending"):
        recommender = _load(args)
        context = recommender.context(args.user, args.history, args.scenario, args.trigger, args.query, args.attributes)
        return recommender, recommender.recommend(context, args.k, args.instruction, args.allow, args.deny)


def evaluate(args: argparse.Namespace) -> None:
    """Prints the table that the fit stored, or measures it anew."""
    if args.out and not args.again:
        raise GenrecError("--out keeps a new measurement: give --again too, or leave it out")
    if args.scenario != HOME and not args.again:
        raise GenrecError(f"the stored table is of {HOME}: give --again to measure --scenario {args.scenario}")
    if len(args.bundle) > 1 and not args.again:
        raise GenrecError("several bundles have no stored table together: give --again too")
    from genrec.bundle import Bundle

    if args.again:
        found = _measure(args.bundle, args.out, args.scenario)
    else:
        with terminal.work("checking"):
            Bundle.load(args.bundle[0])
        found = _stored_report(args.bundle[0])
    if args.json:
        terminal.show_json(found)
    else:
        terminal.show_report(found, args.slices)


def _measure(folders: list[Path], out: Path | None, scenario: str) -> dict[str, Any]:
    from genrec.io import check_writable, read_json

    if out:
        check_writable(out)
    with terminal.work("measuring") as report, tempfile.TemporaryDirectory(prefix="genrec-") as temporary:
        from genrec.bundle import Bundle
        from genrec.device import fastest_device
        from training.evaluate import evaluate_bundles
        from training.fit import SPLITS

        bundles = [Bundle.load(path, device=fastest_device()) for path in folders]
        folder = out or Path(temporary)
        first = bundles[0]
        for path, parts in zip(folders[1:], bundles[1:], strict=True):
            for name in ("data", "inputs", "protocol"):
                if parts.config[name] != first.config[name]:
                    raise GenrecError(
                        f"{path} has {name} {parts.config[name]!r}, {folders[0]} has {first.config[name]!r}: "
                        "one table needs the same requests"
                    )
        if scenario not in first.dataset.scenarios:
            known = ", ".join(first.dataset.scenarios)
            raise GenrecError(f"unknown scenario {scenario!r}; this bundle has: {known}")
        evaluate_bundles(bundles, SPLITS[first.config["protocol"]](first.dataset), folder, report, scenario)
        return dict(read_json(folder / "report.json"))


def _stored_report(bundle: Path) -> dict[str, Any]:
    from genrec.io import read_json

    return dict(read_json(bundle / "report" / "report.json"))


def ui(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    _need_gradio()
    from ui.app import launch

    launch(args.bundle, args.host, args.port, args.store, args.ranker)


def _need_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise missing_package("gradio", "ui")
