"""The settings of an alignment, apart from it: `genrec align --help` reads them without loading torch or numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec.errors import GenrecError

LOSSES = ("sa-gcpo", "sapo", "grpo", "dapo", "gspo", "cispo", "ecpo", "gbpo")  # the keys of genrec.alignment.losses
ROLLOUTS = ("sampled", "beam")
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
    steps: int = field(default=400, metadata={"help": "optimiser steps, at most"})
    updates: int = field(default=4, metadata={"help": "optimiser steps on each batch of rollouts"})
    requests: int = field(default=48, metadata={"help": "requests in a batch of rollouts"})
    group: int = field(default=16, metadata={"help": "completions of each request"})
    rollouts: str = field(
        default="sampled", metadata={"help": "drawn without replacement, or the best by beam", "choices": ROLLOUTS}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate; it falls to 0 as a cosine"})
    anchor: float = field(default=0.5, metadata={"help": "weight of the next-token loss on what users really chose"})
    anchor_positions: int = field(default=512, metadata={"help": "training positions of it in each step"})
    average: float = field(default=0.99, metadata={"help": "decay of the weights' moving average, which is the result"})
    evaluate_steps: int = field(default=40, metadata={"help": "optimiser steps between validations"})
    patience: int = field(default=4, metadata={"help": "stop after so many validations without a new best (0: never)"})
    weights: str = field(default="", metadata={"help": "reward weights: a file like genrec/alignment/scenarios.toml"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (fast where the processor has it)"})
    checkpoint_seconds: float = field(default=60.0, metadata={"help": "seconds between checkpoints"})

    def __post_init__(self) -> None:
        for name, choices in (("loss", LOSSES), ("rollouts", ROLLOUTS)):
            if getattr(self, name) not in choices:
                raise GenrecError(f"unknown {name} {getattr(self, name)!r}; there are: {', '.join(choices)}")
        least = {"steps": 1, "updates": 1, "requests": 1, "group": 2, "anchor_positions": 1, "evaluate_steps": 1}
        for name, value in (least | {"patience": 0, "seed": 0}).items():
            if getattr(self, name) < value:
                raise GenrecError(f"{name} is {getattr(self, name)}; it must be at least {value}")
        for name in ("temperature_positive", "temperature_negative", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise GenrecError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("anchor", "checkpoint_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise GenrecError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.average < 1:
            raise GenrecError(f"average is {self.average}; it must be at least 0 and less than 1")

    def as_dict(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}
