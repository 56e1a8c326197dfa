"""Settings of CAPTS (arXiv 2602.12564): channels, look-ahead replay, routing network, routing.

From the paper: a shared quota, value attributed by replay over a future window on each channel, a value head, a
calibrator and a uniqueness head, three losses. The paper as we could read it states no numbers: window, depth, quota,
weights of the losses and the sizes of the network are ours (docs/retrieval-tools.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from genrec.errors import GenrecError, check_least

CHANNELS = ("itemknn", "markov", "content", "ebr", "item2vec")
POLICIES = ("learned", "independent", "recent", "feedback", "pinnersage", "pdn")
CREDIT = ("full", "split")
SUPERVISION = ("lookahead", "trigger")


@dataclass(frozen=True)
class CAPTSConfig:
    """What is fitted, and how a request is routed.

    channels: the item-to-item tables, out of CHANNELS. neighbours: R, rows kept per item and channel. ebr_steps: of the
    training of the vectors behind the channel "ebr".

    Replay: past: share of the training events, by the clock, that builds the tables; the rest is looked ahead into.
    window: days after a request that count. depth: unseen items of a list that are credited, and compared for overlap;
    about what a pair brings. credit: "full" to every trigger and channel that found an item, or "split" evenly among
    them. threshold: how much credit makes a label: more than this quantile of the channel's credits above zero; 0: any.
    supervision: "trigger" is the control: feedback on the trigger itself in place of what it retrieves, which says
    nothing of uniqueness (uniqueness and eta must be 0).

    Network: triggers (newest different items that are looked at), width, epochs, rows (requests per batch),
    learning_rate, weight_decay, patience. calibration, uniqueness: weights of the two further losses.

    Routing: policy: see POLICIES. quota: pairs of trigger and channel per request. discount: how far overlap with the
    pairs taken lowers the others, 0 to 1. eta: what uniqueness adds to value. least, most: pairs per channel (most 0:
    no bound). seed: of everything random.
    """

    channels: tuple[str, ...] = ("itemknn", "markov", "content", "ebr")
    neighbours: int = 64
    ebr_steps: int = 400
    past: float = 0.75
    window: float = 120.0
    depth: int = 8
    credit: str = "full"
    threshold: float = 0.0
    supervision: str = "lookahead"
    triggers: int = 50
    width: int = 32
    epochs: int = 12
    rows: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    patience: int = 3
    calibration: float = 0.1
    uniqueness: float = 0.1
    policy: str = "learned"
    quota: int = 10
    discount: float = 1.0
    eta: float = 0.2
    least: int = 0
    most: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        if not self.channels or len(set(self.channels)) < len(self.channels):
            raise GenrecError("CAPTS needs at least one channel, each named once")
        known = {"policy": POLICIES, "credit": CREDIT, "supervision": SUPERVISION}
        said = [("channel", c, CHANNELS) for c in self.channels] + [
            (n, getattr(self, n), of) for n, of in known.items()
        ]
        for name, value, of in said:
            if value not in of:
                raise GenrecError(f"unknown {name} {value!r} of CAPTS; there are: {', '.join(of)}")
        least = {"neighbours": 1, "ebr_steps": 1, "depth": 1, "triggers": 1, "width": 4, "epochs": 0, "rows": 1}
        least |= {"patience": 1, "quota": 1, "least": 0, "most": 0, "seed": 0}
        least |= dict.fromkeys(("window", "learning_rate", "weight_decay", "calibration", "uniqueness", "eta"), 0)
        check_least(self, least, "CAPTS' ")
        if not 0 < self.past < 1 or not 0 <= self.discount <= 1:
            raise GenrecError(f"past is {self.past}, discount {self.discount}; both are shares between 0 and 1")
        if not 0 <= self.threshold < 1:
            raise GenrecError(f"CAPTS' threshold is {self.threshold}; it must be at least 0 and less than 1")
        if self.supervision == "trigger" and (self.uniqueness or self.eta):
            raise GenrecError("CAPTS' supervision 'trigger' knows no uniqueness; set uniqueness and eta to 0")
        if self.least * len(self.channels) > self.quota or (self.most and self.most < self.least):
            raise GenrecError(
                f"{len(self.channels)} channels with {self.least} to {self.most} pairs each do not fit a quota of "
                f"{self.quota}"
            )
