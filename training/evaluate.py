"""Measures a bundle: every tool alone, their fusion, the generator alone, and all fused, on the same requests.

    python -m training.evaluate --help        (the same job as `genrec eval --again`)

Weights are chosen on validation requests; the test requests are ranked once. One pass over the requests serves
all systems, so that each row of the table stands on the same inputs. "floors fused" is the tools' fusion without
the generator; "generator alone" is its beam without any tool; "genrec fused" is what the recommender serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genrec.bundle import Bundle
from genrec.candidates import GENERATOR, Shortlist, allowed_items, shortlist
from genrec.contracts import HOME
from genrec.data import SCENARIOS, EvalSet, Sequences, Split, eval_set
from genrec.errors import GenrecError
from genrec.evaluation.intervals import paired
from genrec.evaluation.metrics import ndcg
from genrec.evaluation.protocol import Ranked, rank_lists, seen_index, target_ranks, tie_numbers, top_lists
from genrec.evaluation.report import Report, compare, provenance, rows_of, save
from genrec.tokenizer.embeddings import embed_texts
from genrec.tools import Tool
from genrec.tools.fusion import contenders, fit_weights, standardise

if TYPE_CHECKING:
    from genrec.generator.model import GeneratorModel
    from genrec.instructions.timeline import Timeline

CHUNK = 256
WIDTH = 50
WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.5, 5.0)  # the tools' add up to 1
FLOORS_ROW, ALONE_ROW, FUSED_ROW = "floors fused", "generator alone", "genrec fused"


def chunks(requests: EvalSet, size: int = CHUNK) -> Iterator[EvalSet]:
    """The requests in pieces of at most `size`, in order."""
    for start in range(0, len(requests), size):
        yield requests.take(np.arange(start, min(start + size, len(requests))))


def instruction_vectors(parts: Bundle, requests: EvalSet, timeline: Timeline | None = None) -> np.ndarray | None:
    """What each request tells the generator, embedded, float32 [B, text_dim], NaN rows for nothing: its query, else the
    instruction of the timeline (default: the bundle's). None where nothing is ever told: the bundle cannot read text,
    or no request has a query and there is no timeline."""
    timeline = parts.timeline if timeline is None else timeline
    if parts.config["embeddings"]:
        return None
    texts: dict[int, str] = {}
    for b, context in enumerate(requests.contexts):
        if context.query:
            texts[b] = context.query
        elif timeline is not None:
            found = int(timeline.find(context.user or "", np.array([len(context.history)]))[0])
            texts |= {b: timeline.texts[found]} if found >= 0 else {}
    if not texts and timeline is None:
        return None
    out = np.full((len(requests), parts.embeddings.shape[1]), np.nan, np.float32)
    if texts:
        out[list(texts)] = embed_texts(parts.embedder, list(texts.values()))
    return out


def requests_of(parts: Bundle, split: Split, requests: EvalSet, scenario: str) -> EvalSet:
    """The requests of a split as they are in one scenario; home's are the split's own."""
    return requests if scenario == HOME else eval_set(requests, SCENARIOS[scenario], parts.dataset, split.train)


def rank_generator(
    model: GeneratorModel, requests: EvalSet, instructions: np.ndarray | None = None, width: int = 20
) -> Ranked:
    """The generator alone, without any tool. instructions: as `instruction_vectors` gives."""
    import torch

    from genrec.generator.search import beam_search, make_history, make_request

    beams, done, device = [], 0, model.device
    for piece in chunks(requests):
        told = None if instructions is None else instructions[done : done + len(piece)]
        allowed = torch.from_numpy(allowed_items(piece.contexts, model.config.items)).to(device)
        history = make_history(piece.contexts, model.config.max_history).to(device)
        request = make_request(model, piece.contexts, told).to(device)
        beams.append(beam_search(model, history, request, width, allowed).items.cpu().numpy())
        done += len(piece)
    return rank_lists(ALONE_ROW, np.concatenate(beams), requests)


def shortlists(parts: Bundle, requests: EvalSet, floors: Mapping[str, float]) -> Iterator[tuple[EvalSet, Shortlist]]:
    """Each chunk of requests with its shortlist, seen items left out."""
    items, instructions, done = len(parts.dataset.catalog), instruction_vectors(parts, requests), 0
    for piece in chunks(requests):
        told = None if instructions is None else instructions[done : done + len(piece)]
        allowed = allowed_items(piece.contexts, items)
        yield (
            piece,
            shortlist(
                piece.contexts, parts.tools, floors, parts.generator, allowed, told, width=WIDTH, rankers=parts.rankers
            ),
        )
        done += len(piece)


def floor_weights(tools: Mapping[str, Tool], validation: EvalSet) -> dict[str, float]:
    """Weights of the tools' own fusion, by NDCG@10 on validation requests."""
    if not tools or not len(validation):
        return dict.fromkeys(tools, 1.0)
    pieces = []
    for piece in chunks(validation):
        blocks = {name: tool.score_all(piece.contexts) for name, tool in tools.items()}
        pieces.append(contenders(blocks, piece.targets, seen_index(piece.contexts)))
    return fit_weights(pieces)


def fused_weights(parts: Bundle, validation: EvalSet, floors: Mapping[str, float]) -> dict[str, float]:
    """The floors' weights with one for the generator, then one for each ranker, by NDCG@10 on validation requests; they
    add up to 1. A ranker has none where the paired 95 % interval of its gain does not exclude 0: the best of thirteen
    weights gains something on any sample, for a ranker of pure chance too.

    The tools keep their proportions. To choose all weights anew, or the mean of twelve such choices, lost .0030 and
    .0020 NDCG@10 against the floors' fusion (.0811) on 5,000 validation requests of Amazon Beauty that were not chosen
    on; this one weight gained .0006.
    """
    found = list(shortlists(parts, validation, floors))
    most = max(s.rows.shape[1] for _, s in found)

    def whole(blocks: Sequence[np.ndarray], padding: float = 0) -> np.ndarray:
        return np.concatenate([np.pad(x, ((0, 0), (0, most - x.shape[1])), constant_values=padding) for x in blocks])

    rows = whole([s.rows for _, s in found], -1)
    scores = whole([s.fuse(floors) if parts.tools else np.zeros(s.rows.shape, np.float32) for _, s in found])
    wanted, there = rows == validation.targets[:, None], rows >= 0
    present, place = wanted.any(1), wanted.argmax(1)[:, None]
    share = {name: w for name, w in floors.items() if name in parts.tools} if any(floors.values()) else {}
    chosen = dict(share)
    for name in (GENERATOR, *parts.rankers):
        part, tried = whole([s.parts[name] for _, s in found]), {}
        for weight in WEIGHTS if chosen else (1.0,):
            one = np.where(there, scores + np.float32(weight) * part, -np.inf)
            above = (one > np.take_along_axis(one, place, 1)).sum(1)
            tried[weight] = ndcg(np.where(present, above.astype(np.float64), np.inf), 10)
        best = max(tried, key=lambda w: (tried[w].mean(), -w))
        if name != GENERATOR and not paired(tried[best][:, None], tried[0.0][:, None], validation.users)[0].low > 0:
            best = 0.0
        chosen[name], scores = best, scores + np.float32(best) * part
    return {name: round(w / sum(chosen.values()), 4) for name, w in chosen.items()}


def rank_systems(
    parts: Bundle,
    requests: EvalSet,
    say: Callable[[int, int], None] = lambda done, total: None,
    scenario: str = HOME,
) -> list[Ranked]:
    """Every system on the same requests of one scenario, in the order of the table's rows."""
    weights = parts.fusion(scenario)
    names = [*parts.tools, FLOORS_ROW, ALONE_ROW, FUSED_ROW]
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in names}
    lists: dict[str, list[np.ndarray]] = {name: [] for name in names}
    ties = tie_numbers(len(requests))
    done = 0
    for piece, found in shortlists(parts, requests, weights["floors"]):
        seen, tie = seen_index(piece.contexts), ties[done : done + len(piece)]
        scores = dict(found.raw)
        if found.raw:
            scores[FLOORS_ROW] = np.sum(
                [np.float32(w) * standardise(found.raw[n]) for n, w in weights["floors"].items() if w], axis=0
            )
        for name, block in scores.items():
            ranks[name].append(target_ranks(block, piece.targets, seen, tie))
            lists[name].append(top_lists(block, seen, 10))
        served = np.take_along_axis(found.rows, found.order(weights["fused"]), 1)
        for name, ranked in ((ALONE_ROW, found.beam), (FUSED_ROW, served)):
            result = rank_lists(name, ranked, piece)
            ranks[name].append(result.ranks)
            lists[name].append(result.lists)
        done += len(piece)
        say(done, len(requests))
    return [Ranked(n, np.concatenate(ranks[n]), np.concatenate(lists[n])) for n in names if ranks[n]]


def make_report(
    systems: list[Ranked], requests: EvalSet, parts: Bundle, train: Sequences, about: dict, fits: int = 1
) -> Report:
    """The table of all systems, and the fused system against the floors' fusion and the best single floor.

    fits: how many equal runs of requests, one per fit, stand one after the other in `systems` and `requests`.
    """
    counts = np.bincount(train.items, minlength=len(parts.dataset.catalog))
    vectors = parts.embeddings
    rows = [row for ranked in systems for row in rows_of(ranked, requests, counts=counts, vectors=vectors, fits=fits)]
    by_name = {r.system: r for r in systems}
    pairs = []
    for system, baseline in ((FUSED_ROW, FLOORS_ROW), (ALONE_ROW, FLOORS_ROW), (FUSED_ROW, best_floor(parts, systems))):
        if system in by_name and baseline in by_name:
            pairs += compare(by_name[system], by_name[baseline], requests, fits=fits)
    return Report(f"{parts.dataset.name}, {requests.name}", tuple(rows), tuple(pairs), about)


def best_floor(parts: Bundle, systems: list[Ranked]) -> str:
    """The single tool with the highest test NDCG@10: the hardest one to stand beside."""
    found = {r.system: float(ndcg(r.ranks, 10).mean()) for r in systems if r.system in parts.tools}
    return max(found, key=lambda name: found[name], default="")


def evaluate_bundles(
    bundles: Sequence[Bundle], split: Split, folder: Path, report: Callable[[str], None], scenario: str = HOME
) -> str:
    """Ranks the test requests, writes report.json, report.md and plots into `folder`; returns one line for the log.

    scenario: the requests are the split's that qualify, with the trigger or query that they have there (a search's
    query is made of the wanted item, so its scores never stand beside next-item scores: see genrec.data.scenarios).
    Several bundles are fits of the same data with other seeds: every number is their mean, a user with the requests
    of all fits is one cluster of the bootstrap, and `about` holds each fit's own NDCG@10.
    """
    clock = time.perf_counter()
    test = requests_of(bundles[0], split, split.test, scenario)
    if not len(test):
        raise GenrecError(f"no test request qualifies for the scenario {scenario!r}")

    def say(done: int, total: int) -> None:
        if done % (CHUNK * 8) == 0 or done == total:
            report(f"report: {done:,} of {total:,} test requests ranked")

    runs = [rank_systems(parts, test, say, scenario) for parts in bundles]
    names = [r.system for r in runs[0]]
    if any([r.system for r in run] != names for run in runs):
        raise GenrecError("these bundles hold other tools: a table over seeds needs the same systems in each")
    systems = [
        Ranked(name, np.concatenate([r.ranks for r in found]), np.concatenate([r.lists for r in found]))
        for name, *found in zip(names, *runs, strict=True)
    ]
    first = bundles[0]
    seeds = {f"fit {i}" if i else "fit": int(parts.config["seed"]) for i, parts in enumerate(bundles)}
    note = split.note if scenario == HOME else f"{split.note}; scenario {scenario}: {SCENARIOS[scenario].description}"
    about = provenance(note, seeds, time.perf_counter() - clock)
    about |= {"settings": first.config, "fusion": first.fusion(scenario)}
    if len(bundles) > 1:
        about |= {"ndcg_per_fit": {n: [_ndcg(r) for r in f] for n, *f in zip(names, *runs, strict=True)}}
    requests = test.take(np.tile(np.arange(len(test)), len(bundles)))
    save(make_report(systems, requests, first, split.train, about, len(bundles)), folder)
    return "test NDCG@10 " + ", ".join(
        f"{s.system} {_ndcg(s):.4f}" for s in systems if s.system in (FLOORS_ROW, ALONE_ROW, FUSED_ROW)
    )


def _ndcg(ranked: Ranked) -> float:
    return round(float(ndcg(ranked.ranks, 10).mean()), 6)
