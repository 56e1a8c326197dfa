"""Writes instructions for training positions and test requests, as a near-line thinker would have: before each.

    python -m training.instructions --data ml-100k --protocol rolling --writer template --out template.parquet
    python -m training.instructions --data ml-100k --protocol rolling --writer model --out zero-shot.parquet
    python -m training.instructions --data ml-100k --writer model --model ml-100k-v2 --out fine-tuned.parquet
    python -m training.instructions --shuffle template.parquet --out shuffled.parquet
    genrec fit --data ml-100k --protocol rolling --instructions template.parquet --out bundles/told

Every user gets one instruction per `window` events, over the last `windows` windows of the training events, one before
the validation request, and one per `refresh` events at the test requests, the first before the first of them. Each is
written from the events before it alone, and from what the tools propose there: at a training position tools that were
not fitted on that user, at a request the tools of the fit, as online. A request between two of them follows the earlier
one, by then stale. The language model's replies are kept in an SQLite store beside the result: a killed run that is
started again asks for the missing ones only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import prompts
from genrec.contracts import Evidence, UserContext
from genrec.data import Dataset, Split, load_dataset
from genrec.errors import GenrecError
from genrec.instructions import InstructionStore, open_store
from genrec.instructions.context import PromptWriter, has_content
from genrec.instructions.plain import MODEL, plain_instruction
from genrec.instructions.timeline import Timeline
from genrec.io import check_writable
from genrec.terminal import quiet_libraries
from genrec.tools import FLOORS
from genrec.tools.consult import CHUNK, PROPOSED, as_evidence, propose, propose_apart
from serving.instruct import instruct
from serving.llm import Backend, open_model
from serving.models import prompt_of
from training.config import PROTOCOLS
from training.fit import SPLITS, WEIGHING

LEAST = 5  # events that an instruction is written from
Point = tuple[int, int]  # user position, events known


def points(
    split: Split,
    window: int = 10,
    windows: int = 3,
    refresh: int = 10,
    users: int = 0,
    validation: bool = True,
    seed: int = 0,
) -> list[Point]:
    """When instructions are written: (user position, events known), sorted; see the module.

    refresh: a request gets a new instruction once so many events have passed since that of the request before.
    users: of a fixed random sample of that many users whose first test request can be told something; 0 for all.
    validation: False writes none before the validation request, which then follows the last one in training.
    """
    if window < 1 or windows < 0 or refresh < 1 or users < 0:
        said = f"window is {window}, windows {windows}, refresh {refresh}, users {users}"
        raise GenrecError(f"{said}; they must be at least 1, 0, 1 and 0")
    found: set[Point] = set()
    for u, trained in enumerate(split.train.lengths.tolist()):
        ends = range(trained - window, trained - window * windows - 1, -window)
        found |= {(u, n) for n in ends if n >= LEAST}
    for requests in (split.validation, split.test) if validation else (split.test,):
        newest: dict[int, int] = {}
        known = (len(context.history) for context in requests.contexts)
        for u, n in sorted(zip(requests.users.tolist(), known, strict=True)):
            if n >= LEAST and n >= newest.get(u, -refresh) + refresh:
                newest[u] = n
                found.add((u, n))
    if users:
        able = sorted(newest)  # those with an instruction at a test request
        if users > len(able):
            raise GenrecError(
                f"{users:,} users were asked for; only {len(able):,} have {LEAST} events before their test"
            )
        chosen = set(np.random.default_rng(seed).choice(able, users, replace=False).tolist())
        found = {point for point in found if point[0] in chosen}
    return sorted(found)


def context_at(dataset: Dataset, point: Point) -> UserContext:
    """The user's first events as a request, named user@events: an instruction is stored by that name."""
    user, events = point
    context = dataset.sequences.context(user, events)
    return replace(context, user=f"{dataset.sequences.users[user]}@{events}")


def evidence_at(dataset: Dataset, split: Split, asked: list[Point], seed: int = 0) -> list[Sequence[Evidence]]:
    """What the tools together propose at each point, before it.

    At training positions the tools were not fitted on the user; at validation and test requests they are those of a
    fit, with the weights that it chooses. Deterministic in seed, which deals the users into folds.
    """
    from training.evaluate import floor_weights

    train, catalog = split.train, dataset.catalog
    tools = {name: tool().fit(train, catalog) for name, tool in FLOORS.items()}
    weights = floor_weights(tools, split.validation.sample(WEIGHING, seed=2))
    kinds = {name: FLOORS[name] for name, w in weights.items() if w}
    rows = np.full((len(asked), PROPOSED), -1, np.int32)
    sums = np.full((len(asked), PROPOSED), -np.inf, np.float32)
    users, events = (np.array(column, np.int64) for column in zip(*asked, strict=True))
    early = np.flatnonzero(events < train.lengths[users])
    late = np.flatnonzero(events >= train.lengths[users])

    def context(position: int) -> UserContext:
        return context_at(dataset, asked[early[position]])

    rows[early], sums[early] = propose_apart(train, catalog, kinds, weights, users[early], context, PROPOSED, seed=seed)
    for start in range(0, len(late), CHUNK):
        at = late[start : start + CHUNK]
        rows[at], sums[at] = propose(tools, weights, [context_at(dataset, asked[i]) for i in at], PROPOSED)
    return [[piece] for piece in as_evidence(catalog, rows, sums)]


def write(
    dataset: Dataset,
    asked: list[Point],
    prompt: str,
    model: Backend | None,
    store: InstructionStore | None,
    report: Callable[[str], None] = print,
    evidence: Sequence[Sequence[Evidence]] | None = None,
) -> Timeline:
    """The timeline of these points: by the template where there is no model, else by the batch job into `store`.

    evidence: what the tools say at each point (default: nothing). Points whose history says nothing (no title, no
    category) are left out.
    """
    template = prompts.load(prompt)
    contexts = [context_at(dataset, p) for p in asked]
    able = [(p, c) for p, c in zip(asked, contexts, strict=True) if has_content(c, template)]
    said = {c.user: e for c, e in zip(contexts, evidence or [()] * len(asked), strict=True)}
    if model is None or store is None:
        writer = PromptWriter(dataset.catalog, template)
        written = [plain_instruction(c, writer, said[c.user]) for _, c in able]
    else:
        told = [c for _, c in able]
        instruct(
            told,
            dataset.catalog,
            model,
            template,
            store,
            evidence=lambda some: [said[c.user] for c in some],
            report=report,
        )
        written = [i for _, c in able if (i := store.get(c.user or "", c.scenario)) is not None]
    users = tuple(dataset.sequences.users[u] for (u, _), _ in able)
    events = np.array([n for (_, n), _ in able], np.int64)
    return Timeline(users, events, tuple(i.look_for for i in written), tuple(i.model for i in written))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m training.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="ml-100k", help="as for genrec fit (default: %(default)s)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="rolling", help="the split (default: %(default)s)")
    parser.add_argument("--writer", choices=("template", "model"), default="template", help="who writes")
    parser.add_argument("--prompt", help="see python -m prompts (default: the adapter's own, else intent_v2)")
    parser.add_argument("--backend", default="auto", help="of the model (default: %(default)s)")
    parser.add_argument("--model", help="a folder, adapter or hub name (default: the packaged model)")
    parser.add_argument("--window", type=int, default=10, help="events that follow one instruction in training")
    parser.add_argument("--windows", type=int, default=3, help="windows of training events per user")
    parser.add_argument("--refresh", type=int, default=10, help="events that follow one instruction at the requests")
    parser.add_argument("--users", type=int, default=0, help="write for a random sample of that many (default: all)")
    parser.add_argument("--no-validation", action="store_true", help="write none before the validation requests")
    parser.add_argument("--shuffle", type=Path, metavar="FILE", help="shuffle this timeline between users instead")
    parser.add_argument("--seed", type=int, default=0, help="of --shuffle and --users")
    parser.add_argument("--out", type=Path, required=True, help="the Parquet file to write")
    args = parser.parse_args(argv)
    quiet_libraries()
    try:
        check_writable(args.out.parent)
        if args.out.is_dir():
            raise GenrecError(f"{args.out} is a folder; --out names the file to write")
        if args.shuffle:
            timeline = Timeline.load(args.shuffle).shuffled(args.seed)
        else:
            prompt = args.prompt or prompt_of(args.model) or "intent_v2"
            dataset = load_dataset(args.data)
            split = SPLITS[args.protocol](dataset)
            asked = points(
                split, args.window, args.windows, args.refresh, args.users, not args.no_validation, args.seed
            )
            sys.stderr.write(f"{len(asked):,} instructions for {len(dataset.sequences):,} users\n")
            said = evidence_at(dataset, split, asked) if prompts.load(prompt).proposals else None
            if args.writer == MODEL:
                timeline = write(dataset, asked, prompt, None, None, evidence=said)
            else:
                engine = open_model(args.backend, args.model, report=_say, texts=len(asked))
                try:
                    with open_store(args.out.with_suffix(".sqlite")) as store:
                        timeline = write(dataset, asked, prompt, engine, store, _say, said)
                finally:
                    engine.close()
        timeline.save(args.out)
    except GenrecError as error:
        _say(str(error))
        return 2
    _say(f"{args.out}: {len(timeline):,} instructions, {len(set(timeline.texts)):,} different")
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
