"""The settings of a fit, apart from the fit itself: `genrec fit --help` reads them without loading torch or numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec.errors import GenrecError, check_least

PACKAGED = "packaged"  # as genrec.tokenizer.embeddings has it
PROTOCOLS = ("leave-one-out", "rolling", "chronological")  # the keys of training.fit.SPLITS
TOOLS = ("popularity", "itemknn", "ease", "markov", "content")  # the keys of genrec.tools.FLOORS
MORE_TOOLS = ("ebr", "capts")  # the others of genrec.tools.TOOLS: a fit takes minutes
RANKERS = ("marm", "sarm")  # as genrec.tools.rankers has them
HEADS = 4  # the attention heads of genrec.generator.config
MAX_SEED = 2**31 - 1000  # faiss counts in 32 bits, one further a level


@dataclass(frozen=True)
class FitConfig:
    """One fit. Each field is a flag of `genrec fit`; its `help` is the flag's."""

    data: str = field(metadata={"help": "ml-100k, a folder with interactions and items files, or hf:owner/name"})
    out: Path = field(metadata={"help": "the bundle to make"})
    protocol: str = field(default="leave-one-out", metadata={"help": "the split", "choices": PROTOCOLS})
    epochs: int = field(default=20, metadata={"help": "passes of the generator over the training data"})
    d_model: int = field(default=128, metadata={"help": "width of the generator"})
    layers: int = field(default=2, metadata={"help": "encoder layers, and as many decoder layers"})
    dropout: float = field(default=0.1, metadata={"help": "dropout of the generator"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak learning rate of the generator"})
    positions: int = field(default=1024, metadata={"help": "training positions per batch"})
    teaching: float = field(
        default=0.7, metadata={"help": "share of the targets that tools propose in the first 60 % of training"}
    )
    max_history: int = field(default=50, metadata={"help": "newest events that the generator reads"})
    levels: int = field(default=3, metadata={"help": "codes per semantic ID"})
    codes: int = field(default=128, metadata={"help": "codebook size per level"})
    embedder: str = field(
        default=PACKAGED, metadata={"help": "sentence-transformers folder or name (packaged: MiniLM)"}
    )
    embeddings: str = field(
        default="", metadata={"help": "own item embeddings: .npy, a row per catalogue item in order"}
    )
    instructions: str = field(
        default="", metadata={"help": "instructions over time to train and test with (python -m training.instructions)"}
    )
    retrieved: int = field(
        default=0, metadata={"help": "events that the instruction chooses out of a long history (0: no IGR)"}
    )
    recent: int = field(default=20, metadata={"help": "newest events always seen, where --retrieved is above 0"})
    q2i: float = field(default=0.2, metadata={"help": "weight of the Q2I loss, where --retrieved is above 0"})
    tools: tuple[str, ...] = field(
        default=TOOLS, metadata={"help": f"tools to fit, separated by commas; also {', '.join(MORE_TOOLS)}"}
    )
    rankers: tuple[str, ...] = field(
        default=(), metadata={"help": f"rankers of the fused list, fitted on ratings: {', '.join(RANKERS)}"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})
    bf16: bool = field(default=False, metadata={"help": "train in bfloat16 (fast where the processor has it)"})
    checkpoint_seconds: float = field(default=60.0, metadata={"help": "seconds between checkpoints of the generator"})

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise GenrecError(f"unknown protocol {self.protocol!r}; there are: {', '.join(PROTOCOLS)}")
        for kind, names, known in (("tool", self.tools, (*TOOLS, *MORE_TOOLS)), ("ranker", self.rankers, RANKERS)):
            if unknown := [name for name in names if name not in known]:
                raise GenrecError(f"unknown {kind} {unknown[0]!r}; there are: {', '.join(known)}")
            if len(set(names)) < len(names):
                raise GenrecError(f"a {kind} is there twice in {', '.join(names)}; name each once")
        least = {"epochs": 1, "layers": 1, "positions": 1, "max_history": 1, "levels": 2, "codes": 2, "recent": 1}
        check_least(self, least | {"checkpoint_seconds": 0, "retrieved": 0, "q2i": 0})
        if self.d_model < HEADS or self.d_model % HEADS:
            raise GenrecError(f"d_model is {self.d_model}; it must be a multiple of the {HEADS} attention heads")
        if not 0 <= self.seed < MAX_SEED:
            raise GenrecError(f"seed is {self.seed}; it must be between 0 and {MAX_SEED - 1:,}")
        if not 0 < self.learning_rate < math.inf:
            raise GenrecError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.retrieved and self.recent + self.retrieved >= self.max_history:
            raise GenrecError(
                f"max_history is {self.max_history}: with the {self.recent} recent events and the {self.retrieved} "
                f"retrieved ones nothing is left to choose from; make it larger than {self.recent + self.retrieved}"
            )
        if self.instructions and self.embeddings:
            raise GenrecError(
                "own --embeddings have no text encoder to read --instructions with; leave one of them out"
            )
        if not 0 <= self.teaching <= 1:
            raise GenrecError(f"teaching is {self.teaching}; it must be between 0 and 1")
        if not 0 <= self.dropout < 1:
            raise GenrecError(f"dropout is {self.dropout}; it must be at least 0 and less than 1")

    def as_dict(self) -> dict[str, Any]:
        return {
            k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()
        }
