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
from typing import TYPE_CHECKING, Any

from genrec import terminal
from genrec.errors import GenrecError

if TYPE_CHECKING:
    from genrec.contracts import UserContext
    from genrec.data.dataset import Dataset
    from genrec.tools.marm import MARM
    from genrec.tools.ranking.samples import Samples
    from genrec.tools.ranking.tool import Profile
    from genrec.tools.sarm import SARM

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
        from genrec.io import check_writable
        from genrec.tools.marm import MARM, MARMConfig
        from genrec.tools.ranking.report import Scored, cell
        from genrec.tools.ranking.samples import TEST
        from genrec.tools.ranking.task import Task
        from genrec.tools.ranking.train import TrainConfig, positions_of, predict
        from genrec.tools.sarm import SARM, SARMConfig, SARMTraining, anchors_for, stored_anchors
        from genrec.tools.sarm.train import predict as predict_sarm

        check_writable(args.out)
        task = Task.make(samples_of(args), args.split)
        at = positions_of(task, TEST)
        tool: MARM | SARM
        if name == "marm":
            training = _filled(TrainConfig, args)
            tool = MARM.fit(task, _filled(MARMConfig, args), training, report)
            scores = predict(tool.model, task, at, training, tool.memory)
            tool.save(args.out)  # with the states of the test events too: requests come after them
        else:
            catalog = task.samples.catalog
            stored = stored_anchors(args.anchors) if args.anchors else {}
            tool = SARM.fit(
                task, anchors_for(catalog, stored), _filled(SARMConfig, args), _filled(SARMTraining, args), report
            )
            tool.save(args.out)
            scores = predict_sarm(tool.model, task, tool.bank, at)
        found = Scored(task, at, scores[None]).measured()
    if args.json:
        terminal.show_json({"tool": name, "folder": str(args.out), "labels": found})
        return
    for label, values in found.items():
        auc, gauc = cell(values["auc"]), cell(values["gauc"])
        terminal.say(f"{label}: AUC {auc}, GAUC {gauc} over {values['gauc']['users']} users")
    terminal.say(f"{args.out} is ready: genrec rank {name} score --tool {args.out} --user ID --items A,B")


def _filled(kind: Callable[..., Any], args: argparse.Namespace) -> Any:
    """A config of the flags that were given."""
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in vars(args).items() if k in known and v is not None})


def score(name: str, args: argparse.Namespace) -> None:
    """Scores the candidates, best first, each with its reason."""
    with terminal.work("rank"):
        tool = load(name, args.tool)
        context = context_of(tool.profile, args.user, args.history)
        found = reasons(tool, context, _rows(tool.profile, args.items))
    if args.json:
        terminal.show_json({"tool": name, "user": args.user, "items": found})
    else:
        for place, item in enumerate(found, start=1):
            terminal.say(f"{place}. {item['sentence']}")


def load(name: str, folder: Path) -> MARM | SARM:
    """The tool in a folder."""
    from genrec.tools.marm import MARM
    from genrec.tools.sarm import SARM

    return MARM.load(folder) if name == "marm" else SARM.load(folder)


def open_tool(folder: Path) -> MARM | SARM:
    """The tool in a folder, whichever it is."""
    from genrec.io import check_shape, read_json

    path = folder / "tool.json"
    if not path.is_file():
        raise GenrecError(f"{folder} holds no ranking tool; make one with genrec rank marm fit --out {folder}")
    name = check_shape(path, read_json(path), {"name": str})["name"]
    if name not in SIZES:
        raise GenrecError(f"{folder} holds {name!r}, which is no ranking tool; there are: {', '.join(SIZES)}")
    return load(name, folder)


def reasons(tool: MARM | SARM, context: UserContext, rows: list[int]) -> list[dict[str, Any]]:
    """What the command line and the page show of each candidate row, best first: item, title, score, sentence, and
    `events` (MARM: title, share of attention) or `words` (SARM: word, part of the log-odds), JSON-ready."""
    import numpy as np

    titles, out = tool.profile.titles, []
    for reason in tool.explain(context, np.array(rows, np.int64)):
        one: dict[str, Any] = {"item": tool.profile.items[reason.item], "title": titles[reason.item]}
        one |= {"score": round(reason.score, 6), "sentence": reason.sentence}
        if hasattr(reason, "events"):
            one["events"] = [
                {"place": place, "title": titles[row], "share": round(share, 4)} for place, row, share in reason.events
            ]
        else:
            one["words"] = [{"word": word, "worth": round(worth, 4)} for word, worth in reason.words]
            one["anchor"] = reason.anchor
        out.append(one)
    return sorted(out, key=lambda one: -one["score"])


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
