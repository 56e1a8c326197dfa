"""Settings of divide-and-conquer EBR (arXiv 2302.02657): of a fit, and of one request.

From the paper: clusters by k-means or categories, negatives out of the positive's own cluster, a prompt per cluster as
a Hadamard product, M_k = M p_k^alpha / sum p^alpha. The paper as we could read it states neither the number of
clusters, of negatives, the form of the loss nor alpha: those, and every number below, are ours (docs/retrieval-tools.md
says what they were chosen on).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from genrec.errors import GenrecError, check_least

CHOICES = {
    "divide": ("kmeans", "categories", "random"),
    "prompt": ("hadamard", "prefix", "none"),
    "loss": ("softmax", "bce"),
    "negatives_from": ("cluster", "catalogue", "mixed"),
}


@dataclass(frozen=True)
class EBRConfig:
    """How the catalogue is divided, what is learned, and for how long.

    clusters: how many (with "categories" at most so many, the largest); divide: how they are made ("random" is a
    control). prompt: how a cluster speaks to the encoder. single: one user vector for the whole catalogue, the
    baseline; it takes prompt "none" and negatives from "catalogue" or "mixed" (half of them from the target's
    cluster). negatives: per cluster and batch, the whole cluster where it has no more. loss: "bce" is SASRec's own,
    with one negative. content: dimensions of the items' TF-IDF vectors that the encoder also sees (0: identifiers
    only). width, layers, heads, dropout, max_history: of the encoder. steps, rows (sequences per batch), learning_rate,
    weight_decay: of the training; as many steps for every kind of prompt, whose epochs differ in length. check: steps
    between measurements; patience: measurements without a gain after which it ends (0: never). held_out: at most so
    many users (and a tenth of them) lend their last training event for those measurements. alpha: of the merge. seed:
    of everything random.
    """

    clusters: int = 10
    divide: str = "kmeans"
    prompt: str = "hadamard"
    single: bool = False
    negatives: int = 512
    negatives_from: str = "cluster"
    loss: str = "softmax"
    content: int = 128
    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.3
    max_history: int = 50
    steps: int = 1000
    rows: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    check: int = 100
    patience: int = 4
    held_out: int = 1000
    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise GenrecError(f"EBR's {name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        least = {"clusters": 1, "negatives": 1, "content": 0, "layers": 1, "heads": 1, "max_history": 2}
        least |= {"steps": 0, "check": 1, "rows": 1, "patience": 0, "held_out": 0, "width": 1, "seed": 0}
        check_least(self, least | {"learning_rate": 0, "weight_decay": 0, "alpha": 0}, "EBR's ")
        if self.width % self.heads:
            raise GenrecError(f"EBR's width is {self.width}; it must be a multiple of its {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise GenrecError(f"EBR's dropout is {self.dropout}; it must be at least 0 and less than 1")
        if self.single and (self.prompt != "none" or self.negatives_from == "cluster"):
            raise GenrecError("EBR with a single vector takes prompt 'none' and negatives from catalogue or mixed")
        if not self.single and (self.negatives_from != "cluster" or self.loss != "softmax"):
            raise GenrecError("EBR's clusters are learned with a softmax over negatives from the cluster itself")


@dataclass(frozen=True)
class Controls:
    """What one request may ask of the merge.

    alpha: None takes the fitted one; 0 gives every cluster the same share, a large one all to the likeliest. quotas:
    exact numbers of items by cluster label or number, taken off before the rest is shared out. floors: at least so
    many items of a cluster. merge: "quota" (M_k of each cluster), or "global" (the likeliest items, wherever they are);
    None is "quota" where any of the others is set, else "global": quotas are control, and cost recall (measured:
    docs/retrieval-tools.md).
    """

    alpha: float | None = None
    quotas: Mapping[str, int] = field(default_factory=dict)
    floors: Mapping[str, int] = field(default_factory=dict)
    merge: str | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise GenrecError(f"alpha is {self.alpha}; it must be a number of at least 0")
        if self.merge not in (None, "quota", "global"):
            raise GenrecError(f"the merge is {self.merge!r}; it must be quota or global")
        if self.merge == "global" and (self.quotas or self.floors):
            raise GenrecError("the merge is 'global', which has no quotas and no floors; leave it out, or take 'quota'")
        for name, of in (("quota", self.quotas), ("floor", self.floors)):
            for cluster, count in of.items():
                if count < 0:
                    raise GenrecError(f"the {name} of cluster {cluster!r} is {count}; it must be at least 0")

    @property
    def by_quota(self) -> bool:
        """Whether each cluster has its number of items."""
        asked = self.alpha is not None or bool(self.quotas) or bool(self.floors)
        return asked if self.merge is None else self.merge == "quota"
