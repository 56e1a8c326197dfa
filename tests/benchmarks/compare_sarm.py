"""What does each part of SARM bring on data with text, and does it come from the words?

    python tests/benchmarks/compare_sarm.py run --data ml-100k --work sarm-ml --seeds 0 1 2 [--anchors anchors.jsonl]
    python tests/benchmarks/compare_sarm.py table --data ml-100k --work sarm-ml --out docs/results/sarm-ml-100k
    python tests/benchmarks/compare_sarm.py cold --data ml-100k --work sarm-cold --seeds 0 1 2
    python tests/benchmarks/compare_sarm.py cold-table --data ml-100k --work sarm-cold --out docs/results/sarm-cold

Arms: `mmoe` (identifiers and rates, no history), `ids` (+ target attention over the history: the base of all others),
`tags`, `sids` (semantic IDs by residual k-means), `text` (a frozen vector of the catalogue's text), `text-anchor` (the
same of the anchor, which SARM reads), `base` (the encoder over the base tokenizer),
`domain`, `gate` (both token streams), `target` (+ cross-attention), `aux` (+ auxiliary loss), `full` (+ user side:
SARM). Controls: `full-shuffled` (every item has another's anchor, in training and test alike: words still act as
identifiers, so what the text is worth is full minus this, paired), `full-frozen` (the encoder is not trained),
`learned` (the same ranker with learned vectors in the place of the bank's, without auxiliary loss). What training the
text with the ranker is worth is gate minus text-anchor, which read the same words into the same place.

Cold: a fifth of the items is held out, another one for each seed: none of their exposures is trained on, their
identifiers are unknown to every model, the tokenizers have not seen their texts, and only their test exposures are
ranked. The table pools the seeds: an AUC inside a user is taken in each fold apart, as each has its own model, and an
AUC over all is left out. `tfidf` is the likeness of an item's text to the texts that the user liked less those that
they did not.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from command import run_command
from ranking_arms import (
    Found,
    asked_for,
    common_flags,
    common_seeds,
    finished,
    run_arms,
    stacked,
    task_of,
    test_positions,
    write_table,
)

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog
from genrec.device import fastest_device
from genrec.evaluation.auc import gauc
from genrec.tokenizer.embeddings import TextEmbedder
from genrec.tokenizer.semantic_ids import SemanticIDs, TokenizerConfig
from genrec.tools.content import Content, ContentConfig
from genrec.tools.ranking.report import Scored
from genrec.tools.ranking.samples import TEST, TRAIN
from genrec.tools.ranking.task import Task
from genrec.tools.sarm.anchors import Anchor, anchors_for, shuffled, stored_anchors
from genrec.tools.sarm.model import SARMModel, SARMModelConfig
from genrec.tools.sarm.tokens import TokenStreams
from genrec.tools.sarm.train import SARMTraining, predict, train
from genrec.tools.sarm.warm import warm_start

OUT, LEVELS, CODES, FOLDS = 9, 3, 64, 5  # part of an exposure that is left out; semantic IDs; of cold items
ARMS: dict[str, dict[str, Any]] = {
    "mmoe": {"side": "none", "history": False},
    "ids": {"side": "none"},
    "tags": {"side": "tags"},
    "sids": {"side": "sids"},
    "text": {"side": "text"},
    "text-anchor": {"side": "text"},
    "base": {"stream": "base", "target": False, "user_side": False, "aux": 0.0},
    "domain": {"stream": "domain", "target": False, "user_side": False, "aux": 0.0},
    "gate": {"target": False, "user_side": False, "aux": 0.0},
    "target": {"user_side": False, "aux": 0.0},
    "aux": {"user_side": False},
    "full": {},
    "full-shuffled": {},
    "full-frozen": {"frozen": True},
    "learned": {"side": "learned"},
}
PAIRS = (
    ("ids", "mmoe"), ("full", "mmoe"), ("text-anchor", "ids"), ("full", "text-anchor"),
    ("tags", "ids"), ("sids", "ids"), ("text", "ids"), ("base", "ids"), ("domain", "ids"), ("gate", "base"),
    ("target", "gate"), ("aux", "target"), ("full", "aux"), ("full", "ids"), ("full-shuffled", "ids"),
    ("full", "full-shuffled"), ("full", "full-frozen"), ("full", "learned"), ("full-shuffled", "learned"),
    ("learned", "ids"), ("full", "tags"), ("full", "text"),
    ("gate", "text-anchor"), ("gate", "text"),
)  # fmt: skip
COLD_ARMS = ("ids", "tags", "text", "text-anchor", "tfidf", "gate", "full", "full-shuffled")
COLD_PAIRS = (
    ("full", "ids"), ("full", "tags"), ("full", "tfidf"), ("full", "text"), ("full", "text-anchor"),
    ("full", "full-shuffled"), ("gate", "text-anchor"),
)  # fmt: skip


def tags_of(catalog: Catalog) -> np.ndarray:
    """float32 [N, labels], each item's categories, divided by the root of how many it has."""
    names = sorted({label for path in catalog.categories for label in path})
    out = np.zeros((len(catalog), max(1, len(names))), np.float32)
    for row, path in enumerate(catalog.categories):
        for label in set(path):
            out[row, names.index(label)] = len(set(path)) ** -0.5
    return out


@cache
def text_vectors(texts: tuple[str, ...]) -> np.ndarray:
    return TextEmbedder()(texts)


def features_of(arm: str, catalog: Catalog, anchors: list[str]) -> np.ndarray | None:
    """What an arm knows of each item beside its identifier."""
    side = ARMS[arm].get("side", "anchor")
    if side == "tags":
        return tags_of(catalog)
    if arm == "text-anchor":
        return text_vectors(tuple(anchors))
    if side == "text":
        return text_vectors(tuple(catalog.texts))
    if side == "sids":
        ids = SemanticIDs.fit(text_vectors(tuple(catalog.texts)), TokenizerConfig(LEVELS, CODES))
        return np.asarray(ids.codes, np.int64)
    return None


def job(
    task: Task, arm: str, config: SARMTraining, anchors: list[Anchor], args: argparse.Namespace, cold: bool
) -> Found:
    """Fits one arm and scores the test exposures."""
    task = cold_task(task, config.seed) if cold else task
    at = test_positions(task)
    if arm == "tfidf":
        return Found(tfidf(task, at), {})
    options = dict(ARMS[arm])
    config = replace(config, aux=options.pop("aux", config.aux))
    catalog = task.samples.catalog
    side = options.get("side", "anchor")
    texts = [a.text for a in (shuffled(anchors, config.seed) if arm.endswith("shuffled") else anchors)]
    features = features_of(arm, catalog, texts)
    held = cold_items(task, config.seed) if cold else np.zeros(task.items, bool)
    streams = TokenStreams.fit([text for text, out in zip(texts, held, strict=True) if not out])
    tokens, (base, domain) = streams.encode(texts), streams.sizes
    width = 0 if features is None else CODES if side == "sids" else features.shape[1]
    torch.manual_seed(config.seed)
    sizes = SARMModelConfig(
        task.users, task.items, task.tasks, task.width, width=width, levels=LEVELS, base_tokens=base,
        domain_tokens=domain, d=args.d, n=args.n, m=min(20, args.n), **options,
    )  # fmt: skip
    if sizes.side == "sids":  # the last level may have more codes than asked for, where texts are alike
        sizes = replace(sizes, width=int(features.max()) + 1 if features is not None else 1)
    model = SARMModel(sizes, features)
    if side == "anchor":
        warm_start(model.encoder, streams)
    model.to(fastest_device())
    trained = train(model, task, tokens, config, np.where(held, task.items, np.arange(task.items)))
    passes = len(trained.values)
    about = {
        "settings": vars(config) | {"d": args.d, "n": args.n},
        "validation": [round(v, 4) for v in trained.values],
        "seconds per pass": round(trained.seconds / passes, 2),
        "domain words": streams.merged()[:10],
        "written by": sorted({a.model for a in anchors}),
    }
    return Found(predict(model, task, trained.bank, at), about)


def cold_items(task: Task, seed: int) -> np.ndarray:
    """bool [N]: a fifth of the items, another one for each of five seeds."""
    return np.random.default_rng(7).permutation(task.items) % FOLDS == seed % FOLDS


def cold_task(task: Task, seed: int) -> Task:
    """The task whose test asks for held-out items alone, and whose training has none of them."""
    held = cold_items(task, seed)[task.samples.sequences.items]
    part = np.where(held, np.where(task.part == TEST, TEST, OUT), np.where(task.part == TEST, OUT, task.part))
    return Task(task.samples, part.astype(np.int8))


def tfidf(task: Task, at: np.ndarray) -> np.ndarray:
    """Mean likeness of each exposure's text to the whole history's, weighted by its feedback less the user's mean,
    [B, T]."""
    s, catalog = task.samples.sequences, task.samples.catalog
    tool = Content(ContentConfig(recency=1.0)).fit(s.keep(task.part == TRAIN), catalog)
    out = np.zeros((len(at), task.tasks), np.float32)
    for start in range(0, len(at), 512):
        part = at[start : start + 512]
        contexts = []
        for p in part.tolist():
            first, end = int(s.offsets[s.user_of[p]]), int(task.known[p])  # events of the same second are not known
            told = task.feedback[first:end, 0]
            told = (told - told.mean()) / len(told) if len(told) else told
            contexts.append(UserContext(history=tuple(s.items[first:end].tolist()), weights=tuple(told.tolist())))
        out[start : start + 512] = tool.score_all(contexts)[np.arange(len(part)), s.items[part]][:, None]
    return out


def run(args: argparse.Namespace, cold: bool = False) -> None:
    stored = stored_anchors(args.anchors) if args.anchors else None
    task = task_of(args.data, args.label, args.split)
    anchors = anchors_for(task.samples.catalog, stored)
    changes = {} if args.epochs is None else {"epochs": args.epochs}
    settings = {k: v for k, v in vars(SARMTraining(**changes)).items() if k != "seed"}
    texts = hashlib.sha256("\n".join(a.text for a in anchors).encode()).hexdigest()[:16]
    run_arms(
        args.work, args.arms, args.seeds,
        lambda arm, seed: {arm: job(task, arm, SARMTraining(seed=seed, **changes), anchors, args, cold)},
        asked_for(args) | settings | {"d": args.d, "n": args.n, "anchors": texts, "cold": cold},
    )  # fmt: skip


def table(args: argparse.Namespace, cold: bool = False) -> None:
    found = finished(args.work, args.arms, asked_for(args) | {"cold": cold})
    task = task_of(args.data, args.label, args.split)
    if cold:
        title = f"{task.samples.name}: items held out of the training"
        systems = pooled(task, found)
        notes = [f"{arm}, GAUC of each fold: {', '.join(by_fold(task, runs))}" for arm, runs in found.items()]
        write_table(systems, found, COLD_PAIRS, args.out, title, args.split, notes)
    else:
        title = f"{task.samples.name}: SARM, part by part"
        write_table(stacked(found, task, test_positions(task)), found, PAIRS, args.out, title, args.split)


def pooled(task: Task, found: dict[str, dict[int, Found]]) -> dict[str, Scored]:
    """Each arm's scores on the held-out items of all seeds, one after the other."""
    seeds = common_seeds(found)
    parts = [test_positions(cold_task(task, seed)) for seed in seeds]
    at, fold = np.concatenate(parts), np.repeat(np.arange(len(seeds)), [len(p) for p in parts])
    groups = task.samples.sequences.user_of[at] * len(seeds) + fold
    return {
        arm: Scored(task, at, np.concatenate([runs[s].scores for s in seeds])[None], (), groups=groups)
        for arm, runs in found.items()
    }


def by_fold(task: Task, runs: dict[int, Found]) -> list[str]:
    """GAUC of the main label on each seed's own items."""
    out = []
    for seed, one in sorted(runs.items()):
        at = test_positions(cold_task(task, seed))
        out.append(f"{gauc(task.samples.labels[at, 0], one.scores[:, 0], task.samples.sequences.user_of[at]):.4f}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, cold, arms in (("run", False, tuple(ARMS)), ("cold", True, COLD_ARMS)):
        one = commands.add_parser(name, help="fit the arms")
        common_flags(one, arms)
        one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        one.add_argument("--epochs", type=int, help="passes (default: that of SARMTraining)")
        one.add_argument("--n", type=int, default=30, help="events of history")
        one.add_argument("--d", type=int, default=32, help="width")
        one.add_argument("--anchors", type=Path, help="of `genrec rank sarm anchors` (default: the template's)")
        one.set_defaults(run=lambda args, cold=cold: run(args, cold))
        one = commands.add_parser("table" if name == "run" else "cold-table", help="the table over finished arms")
        common_flags(one, arms)
        one.add_argument("--out", type=Path, required=True)
        one.set_defaults(run=lambda args, cold=cold: table(args, cold))
    torch.set_num_threads(1)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
