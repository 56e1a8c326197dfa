"""Do searches find more when the language model has said before what their texts mean?

    python tests/benchmarks/measure_rewriting.py --bundle bundles/ml-100k --work rewriting \\
        --out docs/results/rewriting-ml-100k

The validation requests of the search scenario, whose text is made of words of the wanted item (genrec.data.scenarios):
the best that can be said already, so a rewriting can hardly win here; what it costs is the question. A sample of
--texts different texts is rewritten by `--model` (the packaged one, by default) under `rewrite_v1`, in a store of the
model's own in --work. NDCG@10 and HR@10 of the wanted item, without and with the rewritings, and with each dealt to
another text (the control), fused and by the generator alone; differences are paired, intervals over users.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]

import prompts
from genrec.bundle import Bundle
from genrec.candidates import GENERATOR
from genrec.contracts import SEARCH
from genrec.evaluation.intervals import bootstrap, paired
from genrec.evaluation.metrics import hit_rate, ndcg
from genrec.evaluation.report import provenance
from genrec.instructions.plain import MODEL as TEMPLATE
from genrec.instructions.store import QUERY, query_key
from genrec.io import write_json, write_text
from genrec.recommender import Recommender
from serving.instruct import instruct
from serving.llm import open_model
from training.evaluate import requests_of
from training.fit import SPLITS

K, BATCH = 10, 64
PARTS = {"fused": None, "generator alone": {GENERATOR: 1.0}}


def ranks(recommender: Recommender, contexts: list, targets: np.ndarray, part: str) -> np.ndarray:
    """The place of each wanted item among the first K, infinite where it is not."""
    out = np.full(len(contexts), np.inf)
    for start in range(0, len(contexts), BATCH):
        for b, trace in enumerate(recommender.recommend_batch(contexts[start : start + BATCH], K, weights=PARTS[part])):
            rows = [item.row for item in trace.recommended]
            if targets[start + b] in rows:
                out[start + b] = rows.index(targets[start + b])
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the rewritings are kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--model", help="as of genrec instruct")
    args = parser.parse_args()
    clock = time.perf_counter()
    store = args.work / f"{args.model or 'packaged'}.sqlite".replace("/", "-")
    bundle = Bundle.load(args.bundle, store)
    split = SPLITS[bundle.config["protocol"]](bundle.dataset)
    requests = requests_of(bundle, split, split.validation, SEARCH)
    texts = sorted({query_key(c.query or "")[0] for c in requests.contexts})
    chosen = set(np.random.default_rng(0).permutation(texts)[: args.texts].tolist())
    kept = np.array([i for i, c in enumerate(requests.contexts) if query_key(c.query or "")[0] in chosen])
    requests = requests.take(kept)
    raw = Recommender(Bundle.load(args.bundle, args.work / "none.sqlite"))  # a store that does not exist is empty
    asked = [replace(c, user=None) for c in requests.contexts]
    queries = [
        replace(asked[0], history=(), times=(), weights=(), user=t, query=t, scenario=QUERY) for t in sorted(chosen)
    ]
    engine = open_model("auto", args.model, report=print, texts=len(queries))
    try:
        instruct(queries, bundle.dataset.catalog, engine, prompts.load("rewrite_v1"), bundle.store, report=print)
        name = engine.name
    finally:
        engine.close()
    written = {user: i for user, kind, i in bundle.store.all() if kind == QUERY and user in chosen}
    replaced = sum(i.model == TEMPLATE for i in written.values())
    names = sorted(written)
    dealt = args.work / "dealt.sqlite"
    dealt.unlink(missing_ok=True)
    others = Bundle.load(args.bundle, dealt)
    others.store.put_many([(n, QUERY, written[m]) for n, m in zip(names, np.roll(names, 1).tolist(), strict=True)])
    systems = {"as typed": raw, "rewritten": Recommender(bundle), "another text's": Recommender(others)}
    about = provenance(f"{bundle.dataset.name}, searches of the validation", {"texts": 0}, 0.0)
    found: dict[str, object] = {
        "requests": len(requests),
        "texts": len(names),
        "model": name,
        "replaced": replaced,
    }
    lines = [
        f"{len(requests)} searches, {len(names)} texts rewritten by {name}, {replaced} of them by the template\n",
        "| | NDCG@10 | HR@10 | NDCG@10 less as typed |", "|---|---|---|---|",
    ]  # fmt: skip
    for part in PARTS:
        base = None
        for system, recommender in systems.items():
            places = ranks(recommender, asked, requests.targets, part)
            each = np.stack([ndcg(places, K), hit_rate(places, K)], axis=1)
            base = each if base is None else base
            less = paired(each, base, requests.users)[0]
            values = [round(i.mean, 4) for i in bootstrap(each, requests.users)]
            found[f"{part}, {system}"] = {"ndcg": values[0], "hr": values[1], "less": [less.mean, less.low, less.high]}
            said = "" if system == "as typed" else f"{less.mean:+.4f} [{less.low:+.4f}, {less.high:+.4f}]"
            lines.append(f"| {part}, {system} | {values[0]:.4f} | {values[1]:.4f} | {said} |")
    examples = {n: written[n].look_for for n in names[:: max(1, len(names) // 12)]}
    lines += [
        "",
        "| typed | rewritten |",
        "|---|---|",
        *(f"| {n} | {t.replace('|', ' ')} |" for n, t in examples.items()),
    ]
    about["seconds"] = round(time.perf_counter() - clock, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "report.json", {"about": about, "found": found, "examples": examples})
    write_text(args.out / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
