"""EBR as a tool: divide the catalogue, one user vector per cluster, merge (2302.02657).

    from genrec.tools.ebr import EBR, Controls
    ebr = EBR().fit(split.train, catalog)
    (found,) = ebr.retrieve([context], 100, Controls(alpha=0.5))

Ours: the score of an item is the logarithm of how much likelier it is than a random pick, log(N P(item)), with
P(item) = share of its cluster x softmax inside the cluster. Training makes both parts of it, so scores of different
clusters can be compared, and a score above zero says something.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from genrec.contracts import Evidence, UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.tools.base import CHUNK, Tool, check_rows, events, short_title
from genrec.tools.ebr.clusters import Clusters, divide
from genrec.tools.ebr.config import Controls, EBRConfig
from genrec.tools.ebr.index import EXACT, ClusterIndex
from genrec.tools.ebr.merge import counts_of, sharpened
from genrec.tools.ebr.vectors import ItemVectors

if TYPE_CHECKING:
    import torch

    from genrec.tools.ebr.model import Encoder
    from genrec.tools.ebr.train import HeldOut
    from genrec.tools.learning import Learned

RECENT = 9  # newest events that the sentence counts
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class EBR(Tool):
    """See the module. `controls` is what every request gets that brings none of its own.

    judge: measured in training in place of held-out training events, where one has better to choose by. vectors: the
    items' vectors, for fits that share them.
    """

    name = "ebr"
    sentence = "{seen}; likely next: {found}."
    config_type = EBRConfig
    quick: ClassVar[bool] = False
    config: EBRConfig
    clusters: Clusters
    encoder: Encoder
    learned: Learned
    judge: Callable[[EBR], float] | None = None
    vectors: ItemVectors | None = None

    def __init__(self, config: EBRConfig | None = None) -> None:
        super().__init__(config)
        self.controls = Controls()
        self._index: list[ClusterIndex] = []  # one at most; steered copies share it

    def steered(self, controls: Controls) -> Self:
        """The same tool, with these controls for requests that bring none. Raises GenrecError for unknown clusters."""
        for name in (*controls.quotas, *controls.floors):
            self.clusters.number(name)
        other = copy.copy(self)
        other.controls = controls
        return other

    # -- fit -----------------------------------------------------------------------------------------

    def fit(self, train: Sequences, catalog: Catalog) -> Self:
        """Divides, then trains. With `work` set it goes on from the checkpoint there."""
        import torch

        from genrec.tools.ebr.model import Encoder
        from genrec.tools.ebr.train import train_encoder

        self.titles = [short_title(t) for t in catalog.titles]
        vectors = self.vectors or ItemVectors(train, catalog)
        self.clusters = divide(train, catalog, self.config, vectors)
        content = vectors.content(self.config.content).astype(np.float16)  # as it will be stored
        torch.manual_seed(self.config.seed)
        self.encoder = Encoder(self.config, content, len(self.clusters))
        checkpoint = None if self.work is None else Path(self.work) / "ebr.safetensors"
        judge = None if self.judge is None else self._judged
        parts = (self.encoder, train, self.clusters, self._held_out_quality)
        self.learned = train_encoder(*parts, checkpoint, self.say, judge)
        return self._ready()

    def _judged(self) -> float:
        assert self.judge is not None
        return self.judge(self._ready())

    def _ready(self) -> Self:
        """Fixes the item vectors, ordered by cluster, after training or loading."""
        import torch

        self.encoder.eval()
        with torch.no_grad():
            rows = torch.arange(len(self.titles))
            self.items = torch.cat([self.encoder.vectors(part) for part in rows.split(65536)]).numpy()
        self._index = []
        return self

    def _held_out_quality(self, held: HeldOut) -> float:
        """Mean 1 / log2(rank + 2) of the held-out events among unseen items: NDCG without a cut, so less noisy."""
        self._ready()
        total, done = 0.0, 0
        for at in by_length([len(h) for h in held.histories]):
            histories, targets = [held.histories[i] for i in at], held.targets[at]
            scores = self.score_all([UserContext(tuple(h.tolist())) for h in histories])
            for row, (history, target) in enumerate(zip(histories, targets, strict=True)):
                own = scores[row, target]
                scores[row, history] = -np.inf
                rank = int((scores[row] > own).sum())
                total, done = total + 1 / np.log2(rank + 2), done + 1
        return total / max(1, done)

    # -- score ---------------------------------------------------------------------------------------

    def user_vectors(self, contexts: list[UserContext]) -> np.ndarray:
        """float32 [B, K + 1, d]: the user as every cluster sees them, and the un-prompted vector last, in one batched
        pass; zeros for an empty history. The newest `max_history` events are read."""
        import torch

        size, k = self.config.max_history, len(self.clusters)
        histories = [events(c)[0][-size:] for c in contexts]
        out = np.zeros((len(contexts), k + 1, self.config.width), np.float32)
        there = [i for i, h in enumerate(histories) if h]
        if not there:
            return out
        lengths = torch.tensor([len(histories[i]) for i in there])
        rows = torch.zeros(len(there), int(lengths.max()), dtype=torch.long)
        for at, i in enumerate(there):
            rows[at, : len(histories[i])] = torch.tensor(histories[i])
        prompts = torch.arange(k + 1) if self.config.prompt != "none" else torch.tensor([k])
        with torch.inference_mode():
            x = self.encoder.vectors(rows).repeat_interleave(len(prompts), 0)
            states = self.encoder.encode(x, prompts.repeat(len(there)))
            last = (lengths - 1).repeat_interleave(len(prompts))
            found = states[torch.arange(len(states)), last].view(len(there), len(prompts), -1)
        out[there] = found.expand(-1, k + 1, -1).numpy()
        return out

    def intent(self, vectors: np.ndarray) -> np.ndarray | None:
        """log p(next item is in cluster k), float32 [B, K], from `user_vectors`; None where a single vector decides."""
        import torch

        if self.encoder.intent is None:
            return None
        with torch.inference_mode():
            logits = self.encoder.intent(torch.from_numpy(vectors[:, -1]))
            return torch.log_softmax(logits, -1).numpy()

    def parts(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p of the clusters, float32 [B, K], and log softmax of every item inside its cluster, float32 [B, N], from
        `user_vectors`."""
        log_p = self.intent(vectors)
        inside = np.empty((len(vectors), len(self.titles)), np.float32)
        mass = np.empty((len(vectors), len(self.clusters)), np.float32)
        for k in range(len(self.clusters)):
            rows = self.clusters.members(k)
            logits = vectors[:, k] @ self.items[rows].T
            top = logits.max(axis=1, keepdims=True)
            mass[:, k] = (np.log(np.exp(logits - top).sum(axis=1, keepdims=True)) + top)[:, 0]
            inside[:, rows] = logits - mass[:, k : k + 1]
        if log_p is None:  # one vector: the clusters' shares are what its softmax over the catalogue gives them
            log_p = mass - np.logaddexp.reduce(mass, axis=1, keepdims=True)
        return log_p, inside

    def scores(self, log_p: np.ndarray, inside: np.ndarray, alpha: float | None = None) -> np.ndarray:
        """log(N P(item)), float32 [B, N], from `parts`; alpha None takes that of the controls, else the fitted one."""
        share = np.log(np.maximum(sharpened(log_p, self._alpha(alpha)), 1e-30))
        return (inside + share[:, self.clusters.of] + np.log(len(self.titles))).astype(np.float32)

    def _alpha(self, alpha: float | None = None) -> float:
        return next(a for a in (alpha, self.controls.alpha, self.config.alpha) if a is not None)

    def score_all(self, contexts: list[UserContext]) -> np.ndarray:
        """float32 [B, N]; all zero for an empty history."""
        return self._score(contexts, self.user_vectors(contexts))

    def _score(self, contexts: list[UserContext], vectors: np.ndarray) -> np.ndarray:
        scores = self.scores(*self.parts(vectors))
        scores[[not events(c)[0] for c in contexts]] = 0.0
        return scores

    # -- retrieve ------------------------------------------------------------------------------------

    def retrieve(self, contexts: list[UserContext], k: int, controls: Controls | None = None) -> list[Evidence]:
        """At most k rows per context, best first: the likeliest, or M_k from every cluster (Controls.merge), without
        history and trigger. Evidence.vector is the user as the likeliest cluster sees them: the un-prompted vector is
        learned for the intent head alone. Raises GenrecError for unknown rows and clusters."""
        check_rows(contexts, len(self.titles))
        tool = self if controls is None else self.steered(controls)
        out: list[Evidence] = []
        for start in range(0, len(contexts), CHUNK):
            out += tool._retrieve(contexts[start : start + CHUNK], k)
        return out

    def _retrieve(self, contexts: list[UserContext], k: int) -> list[Evidence]:
        vectors = self.user_vectors(contexts)
        if not self._index and len(self.items) > EXACT:
            self._index.append(ClusterIndex(self.items, self.clusters))
        if not self._index or self.config.single:
            scores = self._score(contexts, vectors)
            found = [self.evidence(c, row, k) for c, row in zip(contexts, scores, strict=True)]
        else:
            found = self._search(contexts, vectors, self._index[0], k)
        log_p = self.intent(vectors)
        likeliest = np.zeros(len(contexts), np.int64) if log_p is None else log_p.argmax(axis=1)
        own = vectors[np.arange(len(contexts)), likeliest]
        seen = [vector if events(c)[0] else None for c, vector in zip(contexts, own, strict=True)]
        return [dataclasses.replace(e, vector=v) for e, v in zip(found, seen, strict=True)]

    def _search(self, contexts: list[UserContext], vectors: np.ndarray, index: ClusterIndex, k: int) -> list[Evidence]:
        """Through the index: every cluster gives M_k (k where the likeliest are asked for), and as many more as the
        user has seen there."""
        log_p = self.intent(vectors)
        assert log_p is not None
        seen = [np.unique(np.array(events(c)[0], np.int64)) for c in contexts]
        inside = np.stack([np.bincount(self.clusters.of[s], minlength=len(self.clusters)) for s in seen])
        left = self.clusters.sizes[None] - inside
        if self.controls.by_quota:
            counts = counts_of(k, log_p, left, self.clusters, self.controls, self.config.alpha)
        else:
            counts = np.minimum(max(0, k), left)
        rows, logits = index.search(vectors[:, :-1], np.where(counts > 0, counts + inside, 0))
        share = sharpened(log_p, self._alpha())
        mass = index.log_mass(vectors[:, :-1], rows, logits)
        out = []
        for b, context in enumerate(contexts):
            if not len(seen[b]):
                out.append(self._evidence(context, rows[b][:0], logits[b][:0], share[b], np.zeros_like(counts[b])))
                continue
            fresh = ~np.isin(rows[b], seen[b]) & (rows[b] >= 0)
            items, of = rows[b][fresh], self.clusters.of[rows[b][fresh]]
            value = logits[b][fresh] - mass[b, of] + np.log(np.maximum(share[b, of], 1e-30)) + np.log(len(self.titles))
            place = _place_within(of, value)
            keep = place < counts[b, of]
            items, of, value = items[keep], of[keep], value[keep]
            order = np.lexsort((items, -value))[:k]
            given = np.bincount(of[order], minlength=len(self.clusters))
            out.append(self._evidence(context, items[order], value[order], share[b], given))
        return out

    def evidence(self, context: UserContext, scores: np.ndarray, k: int) -> Evidence:
        """Evidence from a row of `score_all`, float32 [N]: the clusters' shares are the sums of its probabilities."""
        seen = np.unique(np.array(events(context)[0], np.int64))
        share = np.bincount(self.clusters.of, np.exp(scores.astype(np.float64)), minlength=len(self.clusters))
        share = share / share.sum()
        if not len(seen):
            return self._evidence(context, np.zeros(0, np.int64), np.zeros(0), share, np.zeros(len(share), np.int64))
        fresh = np.ones(len(scores), bool)
        fresh[seen] = False
        left = np.bincount(self.clusters.of[fresh], minlength=len(self.clusters))
        if not self.controls.by_quota:
            rows = _best(scores, np.flatnonzero(fresh), k)
            counts = np.bincount(self.clusters.of[rows], minlength=len(self.clusters))
        else:
            fixed = Controls(1.0, self.controls.quotas, self.controls.floors)  # the shares have their alpha already
            log_share = np.log(np.maximum(share, 1e-30))[None]
            counts = counts_of(max(0, k), log_share, left[None], self.clusters, fixed, 1.0)[0]
            picked = [
                _best(scores, m[fresh[m]], int(counts[c]))
                for c, m in ((c, self.clusters.members(c)) for c in np.flatnonzero(counts))
            ]
            rows = np.concatenate(picked) if picked else np.zeros(0, np.int64)
        order = np.lexsort((rows, -scores[rows]))
        return self._evidence(context, rows[order], scores[rows[order]], share, counts)

    def _evidence(
        self, context: UserContext, rows: np.ndarray, scores: np.ndarray, share: np.ndarray, counts: np.ndarray
    ) -> Evidence:
        newest = self.clusters.of[list(events(context)[0][-RECENT:])]
        opened = np.bincount(newest, minlength=len(share))
        order = np.lexsort((np.arange(len(share)), -share))
        details = {
            "alpha": self._alpha(),
            "clusters": [
                {
                    "cluster": int(c),
                    "label": self.clusters.labels[c],
                    "share": round(float(share[c]), 4),
                    "items": int(counts[c]),
                    "history": int(opened[c]),
                }
                for c in order
            ],
        }
        text = "Nothing to go by for this user yet."
        if len(rows):
            said = [
                f"{NUMBERS[opened[c]] if opened[c] < len(NUMBERS) else opened[c]} of the last {len(newest)} choices "
                f'opened the cluster "{self.clusters.labels[c]}" ({share[c]:.0%} of what comes next)'
                for c in order[:2]
                if share[c] > 0.1 or c == order[0]
            ]
            found = "; ".join(self.titles[r] for r in rows[:3])
            text = self.sentence.format(seen=", ".join(said), found=found)
            text = text[0].upper() + text[1:]
        return Evidence(self.name, rows.astype(np.int32), scores.astype(np.float32), text, details=details)

    # -- files ---------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        out = {f"encoder.{name}": p.numpy() for name, p in self.encoder.state_dict().items()}
        out["content"] = self.encoder.content.numpy().astype(np.float16)
        out["cluster_of"] = self.clusters.of.astype(np.int32)
        out["labels"] = np.frombuffer("\n".join(self.clusters.labels).encode("utf-8"), dtype=np.uint8)
        return out

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        import torch

        from genrec.tools.ebr.model import Encoder

        labels = tuple(arrays["labels"].tobytes().decode("utf-8").split("\n"))  # a label holds no line break
        self.clusters = Clusters(arrays["cluster_of"], labels)
        if len(self.clusters.of) != len(self.titles) or int(self.clusters.of.max()) >= len(labels):
            raise ValueError("clusters and titles do not fit together")
        self.encoder = Encoder(self.config, arrays["content"], len(labels))
        state: dict[str, torch.Tensor] = {
            name.removeprefix("encoder."): torch.from_numpy(a)
            for name, a in arrays.items()
            if name.startswith("encoder.")
        }
        try:
            self.encoder.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[0]) from None
        self._ready()


def by_length(lengths: list[int], size: int = CHUNK) -> list[np.ndarray]:
    """Positions in chunks of at most `size`, the short histories first: a chunk is padded to its longest."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def _best(scores: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The k of these rows with the highest scores, best first, equals by row."""
    if 0 < k < len(rows):
        rows = rows[np.argpartition(-scores[rows], k - 1)[:k]]
    return rows[np.lexsort((rows, -scores[rows]))][: max(0, k)]


def _place_within(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The place of each entry among those of its group, from 0 for the largest value."""
    order = np.lexsort((-values, groups))
    first = np.searchsorted(groups[order], groups[order], side="left")
    place = np.empty(len(groups), np.int64)
    place[order] = np.arange(len(groups)) - first
    return place
