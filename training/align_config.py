"""The settings of an alignment, apart from it: `genrec align --help` reads them without loading torch or numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec.errors import GenrecError, check_least

LOSSES = ("sa-gcpo", "sapo", "grpo", "dapo", "gspo", "cispo", "ecpo", "gbpo")  # the keys of genrec.alignment.losses
ROLLOUTS = ("sampled", "beam")
RANKINGS = ("anchored", "place")
GUARDS = ("best", "harm")
FLOORED = "sa-gcpo"


@dataclass(frozen=True)
class AlignConfig:
    """One alignment. Each field is a flag of `genrec align`; its `help` is the flag's. All defaults are ours: the paper
    discloses neither group size nor temperatures nor learning rate."""

    bundle: Path = field(metadata={"help": "the bundle whose generator is aligned; it stays as it is"})
    out: Path = field(metadata={"help": "the aligned bundle to make"})
    loss: str = field(default=FLOORED, metadata={"help": "the policy loss", "choices": LOSSES})
    floor: bool = field(default=True, metadata={"help": "the target's reward as floor, where the loss is sa-gcpo"})
    temperature_positive: float = field(
        default=2.0, metadata={"help": "tau+ of the gates of sa-gcpo and sapo: the larger, the narrower"}
    )
    temperature_negative: float = field(default=1.0, metadata={"help": "tau- of the same, where the advantage is <= 0"})
    ranking: str = field(
        default="anchored",
        metadata={
            "help": "the ranker's reward: its score less the drift from the start, or its place",
            "choices": RANKINGS,
        },
    )
    beta: float = field(
        default=0.0, metadata={"help": "price of a nat of drift in the ranker's scores (0: from the bundle's fusion)"}
    )
    steps: int = field(default=480, metadata={"help": "optimiser steps, at most"})
    updates: int = field(default=8, metadata={"help": "optimiser steps on each batch of rollouts"})
    requests: int = field(default=48, metadata={"help": "requests in a batch of rollouts"})
    group: int = field(default=16, metadata={"help": "completions of each request"})
    rollouts: str = field(
        default="sampled", metadata={"help": "drawn without replacement, or the best by beam", "choices": ROLLOUTS}
    )
    injected: int = field(
        default=4, metadata={"help": "last completions of a beam that the target and the ranker's best may replace"}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate; it falls to 0 as a cosine"})
    policy: float = field(default=1.0, metadata={"help": "weight of the policy loss (0: the anchor alone, a control)"})
    shuffled: bool = field(default=False, metadata={"help": "deal each group's rewards out at random, as a control"})
    teaching: float = field(default=0.0, metadata={"help": "share of the anchor's targets that the tools propose"})
    anchor: float = field(default=0.5, metadata={"help": "weight of the next-token loss on what users really chose"})
    anchor_positions: int = field(default=512, metadata={"help": "training positions of it in each step"})
    average: float = field(default=0.99, metadata={"help": "decay of the weights' moving average, which is the result"})
    evaluate_steps: int = field(default=40, metadata={"help": "optimiser steps between validations"})
    patience: int = field(default=4, metadata={"help": "stop after so many validations without a new best (0: never)"})
    guard: str = field(
        default="best",
        metadata={
            "help": "keep the best on validation, or the last without a significant loss there",
            "choices": GUARDS,
        },
    )
    weights: str = field(default="", metadata={"help": "reward weights: a file like genrec/alignment/scenarios.toml"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (fast where the processor has it)"})
    checkpoint_seconds: float = field(default=60.0, metadata={"help": "seconds between checkpoints"})

    def __post_init__(self) -> None:
        for name, choices in (("loss", LOSSES), ("rollouts", ROLLOUTS), ("ranking", RANKINGS), ("guard", GUARDS)):
            if getattr(self, name) not in choices:
                raise GenrecError(f"unknown {name} {getattr(self, name)!r}; there are: {', '.join(choices)}")
        least = {"steps": 1, "updates": 1, "requests": 1, "group": 2, "anchor_positions": 1, "evaluate_steps": 1}
        check_least(self, least | dict.fromkeys(("patience", "seed", "injected"), 0))
        for name in ("temperature_positive", "temperature_negative", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise GenrecError(f"{name} is {getattr(self, name)}; it must be above 0")
        check_least(self, dict.fromkeys(("policy", "anchor", "beta", "checkpoint_seconds"), 0))
        if self.rollouts == "beam" and self.injected >= self.group:
            raise GenrecError(f"injected is {self.injected}; it must be less than group ({self.group})")
        if not 0 <= self.teaching <= 1:
            raise GenrecError(f"teaching is {self.teaching}; it must be from 0 to 1")
        if not 0 <= self.average < 1:
            raise GenrecError(f"average is {self.average}; it must be at least 0 and less than 1")

    def as_dict(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}
