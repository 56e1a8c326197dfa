"""How good the thinkers' texts are, each writer at the same points: the validation request of every user.

    python -m training.quality --data ml-100k --writers template values packaged ml-100k-v2 \\
        --out docs/results/instruction-text

A writer is `template` (no model), `values` (the template, and after it the newest item's year, brand and the like: what
a fine-tuned model may name and the template does not), `packaged` (the packaged model as it is, with few-shot examples)
or what --model takes elsewhere: a shipped adapter, a folder, a hub name. An adapter is asked with its own prompt. What
is measured is defined in genrec.instructions.quality; validation requests are used because nothing was trained on them.
Replies are kept in <out>.work as they come: a killed run that is started again asks for the missing ones only.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import prompts
from genrec.contracts import Evidence, Instruction, UserContext
from genrec.data import Dataset, EvalSet, load_dataset
from genrec.errors import GenrecError
from genrec.evaluation.intervals import bootstrap, paired
from genrec.evaluation.report import Comparison, Report, Row, as_json, as_markdown, provenance
from genrec.instructions import parse, quality
from genrec.instructions.attributes import Attributes
from genrec.instructions.context import Chat, PromptWriter
from genrec.instructions.plain import MODEL, plain_instruction
from genrec.io import read_json, write_json, write_text
from genrec.tokenizer.embeddings import TextEmbedder, embed_texts
from serving.instruct import MAX_TOKENS
from serving.llm import Backend, open_model
from serving.models import prompt_of
from training.config import PROTOCOLS
from training.instructions import evidence_at

PACKAGED, VALUES = "packaged", "values"
CHUNK = 64
Say = Callable[[str], None]
Findings = Sequence[Sequence[Evidence]]  # what the tools say at each point


@dataclass(frozen=True)
class Written:
    """What one writer said at the points. shown: the last turn of each prompt; valid: per point, the first reply's
    validity as it is used (held to the schema), free: the same without a grammar, at the first points only."""

    name: str
    instructions: list[Instruction]
    shown: list[str]
    valid: np.ndarray
    free: np.ndarray


def write_template(dataset: Dataset, contexts: list[UserContext], evidence: Findings) -> Written:
    """The instructions without a model, as the fallback of the batch job writes them."""
    writer = PromptWriter(dataset.catalog, prompts.load("intent_v2"))
    asked = list(zip(contexts, evidence, strict=True))
    shown = [writer.chat(context, said)[-1]["content"] for context, said in asked]
    written = [plain_instruction(context, writer, said) for context, said in asked]
    return Written(MODEL, written, shown, np.ones(len(contexts)), np.zeros(0))


def write_values(dataset: Dataset, contexts: list[UserContext], evidence: Findings) -> Written:
    """The template's look_for, and after it the values of the newest item's fields."""
    plain, columns = write_template(dataset, contexts, evidence), Attributes(dataset.catalog).values.values()
    said = []
    for instruction, context in zip(plain.instructions, contexts, strict=True):
        newest = [column[row] for column in columns for row in context.history[-1:] if column[row]]
        said.append(replace(instruction, look_for=", ".join([instruction.look_for, *newest])))
    return replace(plain, name=f"{MODEL} + {VALUES}", instructions=said)


def write_model(
    dataset: Dataset,
    contexts: list[UserContext],
    evidence: Findings,
    model: str | None,
    free: int,
    work: Path,
    start: Callable[[], Backend],
    say: Say,
) -> Written:
    """A model's first reply at each point, held to the schema; and at the first `free` points without a grammar."""
    template = prompts.load(prompt_of(model) or "intent_v2")
    writer = PromptWriter(dataset.catalog, template)
    chats = [writer.chat(context, said) for context, said in zip(contexts, evidence, strict=True)]
    path = work / f"{Path(model or PACKAGED).name}.json"
    kept = read_json(path) if path.exists() else {}
    identity = {
        "prompt": template.version,
        "max_tokens": MAX_TOKENS,
        "points": [c.user for c in contexts],
        "free": free,
    }
    if kept.get("identity") != identity:
        kept = {"identity": identity, "model": "", "replies": [], "freely": []}
    if len(kept["replies"]) < len(chats) or len(kept["freely"]) < free:
        engine = start()
        try:
            kept["model"] = engine.name
            for name, asked, schema in (("replies", chats, dict(template.schema)), ("freely", chats[:free], None)):
                while len(kept[name]) < len(asked):
                    part: list[Chat] = asked[len(kept[name]) : len(kept[name]) + CHUNK]
                    kept[name] += engine.generate(part, schema, MAX_TOKENS)
                    write_json(path, kept)
                    say(f"{engine.name}: {len(kept[name])} of {len(asked)} {name}")
        finally:
            engine.close()
    parsed = [parse(text, template.schema) for text in kept["replies"]]
    freely = [parse(text, template.schema) is not None for text in kept["freely"]]
    return Written(
        kept["model"],
        [p or plain_instruction(c, writer, e) for p, c, e in zip(parsed, contexts, evidence, strict=True)],
        [chat[-1]["content"] for chat in chats],
        np.array([p is not None for p in parsed], float),
        np.array(freely, float),
    )


def measure(dataset: Dataset, requests: EvalSet, written: Sequence[Written], embedder: TextEmbedder) -> Report:
    """One row per writer with its figures, the history's own row, and the paired differences that matter."""
    attributes, users = Attributes(dataset.catalog), requests.users
    items = embedder(dataset.catalog.texts)
    history = quality.history_vectors(requests.contexts, items)
    neighbour = quality.ring(len(users))

    def hits(vectors: np.ndarray) -> np.ndarray:
        return quality.intent_hits(vectors, requests.contexts, requests.targets, items, attributes)

    alone = hits(history)
    hit_of: dict[str, np.ndarray] = {}
    rows, pairs = [_row("history alone", users, {"intent hit": alone})], list[Comparison]()
    for part in written:
        texts = [i.look_for for i in part.instructions]
        vectors = embed_texts(embedder, texts)
        cut = embed_texts(embedder, [quality.without_values(text, attributes) for text in texts])
        with_history = hits(history + vectors)
        found = {
            "valid": part.valid,
            "intent hit": hits(vectors),
            "intent hit, shuffled": hits(vectors[neighbour]),
            "intent hit, values cut": hits(cut),
            "named": np.array(
                [quality.named(t, int(w), attributes) for t, w in zip(texts, requests.targets, strict=True)]
            ),
            "grounded": np.array(
                [quality.groundedness(i, s) for i, s in zip(part.instructions, part.shown, strict=True)]
            ),
            "distinct": quality.distinctness(texts),
            "repeated": np.array([quality.repetition(text) for text in texts]),
        }
        rows.append(_row(part.name, users, found))
        hit_of[part.name] = found["intent hit"]
        pairs += [_pair(part.name, other, users, found["intent hit"], hit_of[other]) for other in list(hit_of)[:-1]]
        shuffled, both = "its texts shuffled", f"history + {part.name}"
        pairs += [
            _pair(part.name, shuffled, users, found["intent hit"], found["intent hit, shuffled"]),
            _pair(part.name, "history alone", users, found["intent hit"], alone),
            _pair(both, "history alone", users, with_history, alone),
            _pair(both, f"history + {shuffled}", users, with_history, hits(history + vectors[neighbour])),
        ]
        if len(part.free):
            n = len(part.free)
            rows.append(_row(f"{part.name}, no grammar", users[:n], {"valid": part.free}))
    return Report(f"Quality of instructions on {dataset.name}", tuple(rows), tuple(pairs))


def _row(system: str, users: np.ndarray, values: dict[str, np.ndarray]) -> Row:
    intervals = bootstrap(np.stack(list(values.values()), axis=1), users)
    metrics = dict(zip(values, intervals, strict=True))
    return Row(system, "all", len(users), len(np.unique(users)), metrics)


def _pair(system: str, baseline: str, users: np.ndarray, a: np.ndarray, b: np.ndarray) -> Comparison:
    return Comparison(system, baseline, "all", len(users), {"intent hit": paired(a[:, None], b[:, None], users)[0]})


def show(dataset: Dataset, requests: EvalSet, written: Sequence[Written], n: int, say: Say) -> None:
    """The first n points for people: what was chosen last, what was wanted, and what every writer said."""
    attributes = Attributes(dataset.catalog)

    def item(row: int) -> str:
        return f"{dataset.catalog.title(row)} ({attributes.describe(row)})"

    for i, context in enumerate(requests.contexts[:n]):
        say(f"\n{i}. newest: {'; '.join(item(r) for r in context.history[-3:])}")
        say(f"   next: {item(int(requests.targets[i]))}")
        for part in written:
            said = part.instructions[i]
            say(f"   {part.name}: {said.situation} | {'; '.join(said.intents)} | {said.look_for}")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m training.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="ml-100k", help="as for genrec fit (default: %(default)s)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="rolling", help="the split (default: %(default)s)")
    parser.add_argument("--writers", nargs="+", default=[MODEL, PACKAGED], help="who writes; see above")
    parser.add_argument("--users", type=int, default=0, help="measure on this many users, drawn once (default: all)")
    parser.add_argument(
        "--free", type=int, default=64, help="points asked without a grammar too (default: %(default)s)"
    )
    parser.add_argument("--backend", default="auto", help="of the models (default: %(default)s)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the texts of the first N points")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.json and report.md")
    args = parser.parse_args(argv)
    try:
        if args.users < 0 or args.free < 0:
            raise GenrecError(f"--users is {args.users} and --free {args.free}; they must be 0 or more")
        given = sys.argv[1:] if argv is None else argv
        _run(args, f"{parser.prog} {shlex.join(given)}")
    except GenrecError as error:
        _say(str(error))
        return 2
    return 0


def _run(args: argparse.Namespace, command: str) -> None:
    from training.fit import SPLITS

    clock = time.perf_counter()
    about = provenance("", {"sample and shuffle": 0}, 0.0, command)
    dataset = load_dataset(args.data)
    split = SPLITS[args.protocol](dataset)
    requests = split.validation.sample(args.users, seed=0) if args.users else split.validation
    asked = [(int(u), len(c.history)) for u, c in zip(requests.users, requests.contexts, strict=True)]
    evidence = evidence_at(dataset, split, asked)
    work = args.out.with_name(args.out.name + ".work")
    written = []
    for name in args.writers:
        if name in (MODEL, VALUES):
            written.append((write_template if name == MODEL else write_values)(dataset, requests.contexts, evidence))
            continue
        model = None if name == PACKAGED else name

        def start(model: str | None = model) -> Backend:
            return open_model(args.backend, model, report=_say)

        free = min(args.free, len(requests.contexts))
        written.append(write_model(dataset, requests.contexts, evidence, model, free, work, start, _say))
    report = measure(dataset, requests, written, TextEmbedder())
    about |= {
        "protocol": f"the validation requests of {args.protocol}; {quality.RETRIEVED} items retrieved, "
        f"texts shuffled in one ring over users; replies of at most {MAX_TOKENS} tokens",
        "seconds": round(time.perf_counter() - clock, 1),
    }
    report = Report(report.title, report.rows, report.comparisons, about)
    write_json(args.out / "report.json", as_json(report))
    write_text(args.out / "report.md", as_markdown(report))
    _say(as_markdown(report))
    show(dataset, requests, written, args.show, _say)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
