"""`genrec rank`: the ranking tools MARM and SARM on their own: fit on a data source or a bundle, score, write anchors.

    genrec rank marm fit --data ml-100k --out rankers/marm
    genrec rank marm score --tool rankers/marm --user 196 --items 50,181
    genrec rank sarm anchors --data ml-100k --out anchors.jsonl
    genrec rank sarm fit --data ml-100k --anchors anchors.jsonl --out rankers/sarm

Flags that are not given take the defaults of MARMConfig, SARMConfig and their training.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from genrec import terminal
from genrec.errors import GenrecError

if TYPE_CHECKING:
    from genrec.contracts import UserContext
    from genrec.data.dataset import Dataset
    from genrec.tools.ranking.samples import Samples
    from genrec.tools.ranking.tool import Profile

SIZES = {
    "marm": (("layers", "layers"), ("events", "newest events read"), ("d", "width"), ("top", "events of each search")),
    "sarm": (("events", "newest events read"), ("recent", "items on the user side"), ("d", "width")),
}
TRAINING = (("epochs", "passes over the events"), ("batch", "events per step"), ("seed", "of everything random"))


def add(command: Callable[..., argparse.ArgumentParser], model: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds the command. command, model: see genrec.cli."""
    whole = command("rank", lambda args: None, "the ranking tools on their own: marm and sarm")
    tools = whole.add_subparsers(metavar="tool", required=True)
    for name in ("marm", "sarm"):
        actions = tools.add_parser(name, help=f"{name.upper()}", allow_abbrev=False).add_subparsers(
            metavar="action", required=True
        )
        one = actions.add_parser("fit", help="train on feedback and say how well it ranks", allow_abbrev=False)
        _source(one)
        one.add_argument("--out", type=Path, required=True, help="the folder to make")
        one.add_argument(
            "--label", action="append", default=[], metavar="RULE",
            help="what to predict, main one first: COLUMN, NAME=COLUMN or NAME=COLUMN>=N (default: from the ratings)",
        )  # fmt: skip
        one.add_argument("--split", choices=("per-user", "by-time"), default="per-user", help="what the test asks for")
        for flag, said in (*SIZES[name], *TRAINING):
            one.add_argument(f"--{flag}", type=int, metavar="N", help=said)
        if name == "sarm":
            one.add_argument(
                "--anchors", type=Path, metavar="FILE", help="of `genrec rank sarm anchors` (default: none)"
            )
        _json(one, partial(fit, name))
        one = actions.add_parser("score", help="rank items for a user and say why", allow_abbrev=False)
        one.add_argument("--tool", type=Path, required=True, metavar="FOLDER", help="what `fit` made")
        who = one.add_mutually_exclusive_group(required=True)
        who.add_argument("--user", metavar="ID", help="a user of the data set")
        who.add_argument("--history", metavar="IDS", help="items, oldest first: a,b,c; may be ''")
        one.add_argument("--items", required=True, metavar="IDS", help="the candidates: a,b,c")
        _json(one, partial(score, name))
        if name == "sarm":
            one = actions.add_parser("anchors", help="let the language model describe items", allow_abbrev=False)
            _source(one)
            one.add_argument("--out", type=Path, required=True, metavar="FILE", help="the store, JSON lines")
            one.add_argument("--most", type=int, metavar="N", help="only the first N items")
            model(one)
            _json(one, anchors)


def _source(one: argparse.ArgumentParser) -> None:
    where = one.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", metavar="SOURCE", help="a data source, as of genrec fit")
    where.add_argument("--bundle", type=Path, help="the data of a bundle")


def _json(one: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    one.add_argument("--json", action="store_true", help="print JSON, and nothing else on stdout")
    one.set_defaults(run=run)


def samples_of(args: argparse.Namespace) -> Samples:
    """What --data or --bundle and --label name."""
    from genrec.tools.ranking.samples import load_samples, rated_samples

    if args.data:
        return load_samples(args.data, args.label)
    if args.label:
        raise GenrecError("a bundle keeps ratings alone: give --label with --data")
    return rated_samples(_dataset(args))


def _dataset(args: argparse.Namespace) -> Dataset:
    from genrec.bundle import Bundle
    from genrec.data import load_dataset

    return load_dataset(args.data) if args.data else Bundle.load(args.bundle).dataset


def fit(name: str, args: argparse.Namespace) -> None:
    """Fits, measures on the test events, and saves."""
    with terminal.work("rank") as report:
        import numpy as np

        from genrec.io import check_writable
        from genrec.tools.marm import MARM
        from genrec.tools.rankers import filled, make
        from genrec.tools.ranking.report import Scored, cell
        from genrec.tools.ranking.samples import TEST
        from genrec.tools.ranking.task import Task
        from genrec.tools.ranking.train import TrainConfig, positions_of, predict
        from genrec.tools.sarm.train import predict as predict_sarm

        check_writable(args.out)
        task = Task.make(samples_of(args), args.split)
        at = positions_of(task, TEST)
        tool = make(name, task, report, vars(args))
        if isinstance(tool, MARM):
            every = np.flatnonzero(task.part == TEST)  # also those without the main label leave a state
            scores = predict(tool.model, task, every, filled(TrainConfig, vars(args)), tool.memory)[np.isin(every, at)]
        else:
            scores = predict_sarm(tool.model, task, tool.bank, at)
        tool.save(args.out)  # MARM's with the states of the test events too: requests come after them
        found = Scored(task, at, scores[None]).measured()
    if args.json:
        terminal.show_json({"tool": name, "folder": str(args.out), "labels": found})
        return
    for label, values in found.items():
        auc, gauc = cell(values["auc"]), cell(values["gauc"])
        terminal.say(f"{label}: AUC {auc}, GAUC {gauc} over {values['gauc']['users']} users")
    terminal.say(f"{args.out} is ready: genrec rank {name} score --tool {args.out} --user ID --items A,B")


def score(name: str, args: argparse.Namespace) -> None:
    """Scores the candidates, best first, each with its reason."""
    with terminal.work("rank"):
        from genrec.tools.rankers import load, reasons

        tool = load(name, args.tool)
        context = context_of(tool.profile, args.user, args.history)
        found = reasons(tool, context, _rows(tool.profile, args.items))
    if args.json:
        terminal.show_json({"tool": name, "user": args.user, "items": found})
    else:
        for place, item in enumerate(found, start=1):
            terminal.say(f"{place}. {item['sentence']}")


def context_of(profile: Profile, user: str | None, history: str | None) -> UserContext:
    """A user's whole history as the tool knows it, or the given one."""
    from genrec.contracts import UserContext

    if history is not None:
        return UserContext(history=tuple(_rows(profile, history)))
    if user not in profile.numbers:
        raise GenrecError(f"unknown user {user!r}: give a history (it may be empty), or a user of the data set")
    u = profile.numbers[str(user)]
    rows = profile.rows[profile.offsets[u] : profile.offsets[u + 1]]
    return UserContext(history=tuple(rows.tolist()), user=user)


def _rows(profile: Profile, text: str) -> list[int]:
    place = {item: row for row, item in enumerate(profile.items)}
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [item for item in asked if item not in place]:
        raise GenrecError(f"unknown item {unknown[0]!r}: the tool was fitted without it")
    return [place[item] for item in asked]


def anchors(args: argparse.Namespace) -> None:
    """Runs the batch job that writes anchors."""
    with terminal.work("anchors") as report:
        import prompts
        from genrec.commands import model_of
        from genrec.tools.sarm.anchors import AnchorStore
        from serving.anchors import write_anchors

        catalog = _dataset(args).catalog
        if args.most is not None and args.most < 0:
            raise GenrecError(f"--most is {args.most}; it must be at least 0")
        rows = range(len(catalog) if args.most is None else min(args.most, len(catalog)))
        store = AnchorStore(args.out)
        done = write_anchors(catalog, model_of(args, report), prompts.anchor(), store, rows, report=report)
    if args.json:
        terminal.show_json(dataclasses.asdict(done))
    else:
        terminal.say(done.line())
