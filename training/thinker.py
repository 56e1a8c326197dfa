"""Fine-tunes the thinker: TRL's SFTTrainer with a peft LoRA, on what users really chose next.

    python -m training.thinker --data ml-100k --out serving/adapters/ml-100k-v2
    python -m training.instructions --data ml-100k --writer model --model serving/adapters/ml-100k-v2 \\
        --prompt intent_tuned_v2 --out tuned.parquet

An example is a training position: the prompt is what the thinker would have been told there, written by the same
PromptWriter and chat template as at use; the reply is the next `horizon` items in words (genrec.instructions.targets).
Only the reply's tokens are trained on.

Which positions. Targets are training events alone, never validation or test, and of those only events before each
user's last `later` ones. The generator is trained to follow instructions written at those last events (three windows
of ten in training.instructions); had the thinker been fitted on them too, its instructions would be better there than
they are for a new request, and the generator would learn to over-trust them.

A killed run that is started again goes on at its last checkpoint and makes the same adapter. Checkpoints are TRL's own
and stay in <out>.work; the adapter itself is safetensors and JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import prompts
from genrec import __version__
from genrec.data import Dataset, Split, load_dataset
from genrec.errors import GenrecError, check_least, missing_package
from genrec.evaluation.report import provenance
from genrec.instructions.context import Chat, PromptWriter
from genrec.instructions.targets import target, titles_of
from genrec.io import write_json
from serving.models import find_model, quiet_transformers
from training.config import PROTOCOLS
from training.lora import (
    add_flags,
    arguments,
    base_model,
    begun,
    go_on,
    keep_adapter,
    last_checkpoint,
    lora_of,
    weights_digest,
)

if TYPE_CHECKING:
    from transformers import Trainer

Report = Callable[[str], None]
Example = dict[str, Chat]  # prompt and completion, as TRL wants a conversation

LEAST = 5  # events that a prompt is written from


@dataclass(frozen=True)
class ThinkerConfig:
    """One fine-tuning. Each field is a flag; its `help` is the flag's. Defaults are ours: the paper states none."""

    data: str = field(metadata={"help": "ml-100k, a folder with interactions and items files, or hf:owner/name"})
    out: Path = field(metadata={"help": "the adapter's folder"})
    protocol: str = field(
        default="rolling", metadata={"help": "the split; rolling holds out most", "choices": PROTOCOLS}
    )
    prompt: str = field(default="intent_tuned_v2", metadata={"help": "see python -m prompts"})
    model: str = field(default="", metadata={"help": "what to adapt: a folder or hub name (none: the packaged model)"})
    later: int = field(
        default=30, metadata={"help": "last training events of each user kept from the thinker, for the generator"}
    )
    horizon: int = field(default=3, metadata={"help": "next items that a target describes"})
    steps: int = field(default=120, metadata={"help": "optimiser steps"})
    stop: int = field(
        default=0,
        metadata={"help": "end after this many steps; the learning rate still follows all of them"},
    )
    batch: int = field(default=8, metadata={"help": "examples per step"})
    rank: int = field(default=8, metadata={"help": "rank of the LoRA"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    held_out: int = field(default=32, metadata={"help": "users without examples, to measure the loss on"})
    checkpoint_steps: int = field(default=20, metadata={"help": "steps between checkpoints"})
    dtype: str = field(default="auto", metadata={"help": "of the base: auto, float32 or bfloat16"})
    seed: int = field(default=0, metadata={"help": "of everything random"})

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise GenrecError(f"unknown protocol {self.protocol!r}; there are: {', '.join(PROTOCOLS)}")
        check_least(self, dict.fromkeys(("horizon", "steps", "batch", "rank", "checkpoint_steps"), 1))
        if not 0 <= self.stop <= self.steps:
            raise GenrecError(f"stop is {self.stop}; it must be at most steps ({self.steps}), or 0 for all of them")
        if self.later < 0 or self.held_out < 0 or not self.learning_rate > 0:
            raise GenrecError(
                f"later is {self.later}, held_out {self.held_out}, learning_rate {self.learning_rate}; "
                "they must be at least 0, at least 0 and above 0"
            )

    def as_dict(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}


def positions(split: Split, config: ThinkerConfig) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(to train on, to measure the loss on): (user position, events known), in a random order fixed by the seed.

    The `horizon` events that follow each are training events before the user's last `later` ones. Users take turns, so
    that long histories do not crowd out the others; those measured on have no position to train on.
    """
    rng = np.random.default_rng(config.seed)
    last = split.train.lengths - config.later - config.horizon  # the most events that may be known
    able = rng.permutation(np.flatnonzero(last >= LEAST))
    if len(able) <= config.held_out:
        raise GenrecError(
            f"{len(able)} users have {LEAST} events, {config.horizon} that follow and {config.later} later ones in "
            f"training; fine-tuning needs more than held_out ({config.held_out}): lower --later or --held-out"
        )
    turns: list[tuple[int, int, int]] = []
    for u in able[config.held_out :].tolist():
        turns += [(turn, u, n) for turn, n in enumerate(rng.permutation(np.arange(LEAST, int(last[u]) + 1)).tolist())]
    order = rng.permutation(len(turns))
    chosen = sorted(order.tolist(), key=lambda i: turns[i][0])[: config.steps * config.batch]
    measured = [(u, int(rng.integers(LEAST, int(last[u]) + 1))) for u in able[: config.held_out].tolist()]
    return [turns[i][1:] for i in rng.permutation(chosen).tolist()], measured


def examples(dataset: Dataset, split: Split, points: list[tuple[int, int]], config: ThinkerConfig) -> list[Example]:
    """Prompt and reply at each position; positions whose next items have no label are left out. What the tools propose
    there comes from tools that were not fitted on the user."""
    from training.instructions import evidence_at

    template = prompts.load(config.prompt)
    writer = PromptWriter(dataset.catalog, template)
    found = []
    said = evidence_at(dataset, split, points, config.seed) if template.proposals else [()] * len(points)
    for (u, n), evidence in zip(points, said, strict=True):
        context = split.train.context(u, n)
        start = int(split.train.offsets[u]) + n
        following = split.train.items[start : start + config.horizon].tolist()
        chat = writer.chat(context, evidence)
        titles = titles_of(writer.proposed(evidence), following, dataset.catalog)
        wanted = target(context, following, chat[-1]["content"], writer.attributes, template.schema, titles)
        if wanted is not None:
            reply = {"situation": wanted.situation, "intents": list(wanted.intents), "look_for": wanted.look_for}
            text = json.dumps(reply, separators=(",", ":"), ensure_ascii=False)
            found.append({"prompt": chat, "completion": [{"role": "assistant", "content": text}]})
    if not found:
        raise GenrecError(f"{dataset.name} has no categories to describe items by; a thinker has nothing to learn")
    return found


def train(config: ThinkerConfig, report: Report = print, command: str | None = None) -> Path:
    """The finished adapter's folder; one that was made with the same settings is returned as it is.

    command: for the provenance, that of this process by default.
    """
    out = Path(config.out)
    path, base = find_model(config.model or None)
    if not Path(path).is_dir():
        raise GenrecError(f"{path} is no folder; fine-tuning needs the model on the disk, with its weights")
    template = prompts.load(config.prompt)
    identity = config.as_dict() | {"genrec": __version__, "prompt_version": template.version, "base": base}
    identity.pop("out")
    work = begun(out, identity, report)
    if work is None:
        return out
    write_json(work / "config.json", identity)

    from training.fit import SPLITS

    dataset = load_dataset(config.data)
    split = SPLITS[config.protocol](dataset)
    to_train, to_measure = positions(split, config)
    taught = examples(dataset, split, to_train, config)
    measured = examples(dataset, split, to_measure, config) if to_measure else []
    report(f"thinker: {len(taught):,} examples of {len({u for u, _ in to_train}):,} users, {len(measured)} held out")
    clock = time.perf_counter()
    made = provenance(f"{dataset.name}, {config.protocol}", {"seed": config.seed}, 0.0, command)
    trainer = make_trainer(path, taught, measured, config, work, report)
    checkpoint = last_checkpoint(work)
    if checkpoint:
        report(f"thinker: goes on at {checkpoint.name}")
    losses = {"before": _loss(trainer) if measured else None}
    go_on(trainer, checkpoint, config.stop or config.steps)
    losses["after"] = _loss(trainer) if measured else None
    about = {
        "settings": identity,
        "base": {
            "name": base,
            "model": str(Path(path).resolve()) if config.model else base,
            "sha256": weights_digest(Path(path)),
        },
        "examples": len(taught),
        "held_out_loss": losses,
        "resumed": checkpoint is not None,
    }
    about |= made | {"seconds": round(time.perf_counter() - clock, 1)}
    keep_adapter(trainer, out, about)
    shutil.rmtree(work)
    report(f"{out}: {sum(p.stat().st_size for p in out.iterdir()) / 1e6:.1f} MB, held-out loss {losses}")
    return out


def make_trainer(
    path: str, taught: list[Example], measured: list[Example], config: ThinkerConfig, work: Path, report: Report
) -> Trainer:
    """TRL's SFTTrainer over these examples, ready to train; its loss is on the completions alone."""
    try:
        import peft  # noqa: F401
        import trl
    except ImportError as error:
        raise missing_package(f"{error.name or 'trl'} (it fine-tunes the thinker)", "train") from error
    from datasets import Dataset as Table
    from datasets import disable_progress_bars
    from transformers import TrainerCallback, set_seed

    from serving.llm import choose_dtype

    class Lines(TrainerCallback):
        """Progress as lines: after every tenth step and at the end."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                seconds = (time.perf_counter() - started[0]) / max(state.global_step - started[1], 1)
                report(
                    f"thinker: {state.global_step} of {config.steps} steps, loss {float(logs['loss']):.3f}, "
                    f"{seconds:.1f} s a step"
                )

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            started[:] = [time.perf_counter(), state.global_step]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == config.stop

    started = [0.0, 0.0]
    number, why = choose_dtype(config.dtype)
    report(f"thinker: {number} ({why})")
    disable_progress_bars()
    set_seed(config.seed)  # the adapter is drawn before the trainer sets its own seed
    with quiet_transformers():
        tokenizer, model = base_model(path, number)
        settings = trl.SFTConfig(
            **arguments(config, work),
            per_device_train_batch_size=config.batch,
            per_device_eval_batch_size=config.batch,
            lr_scheduler_type="cosine",
            completion_only_loss=True,
            max_length=None,
            packing=False,
            logging_steps=10,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Table.from_list(taught),
            eval_dataset=Table.from_list(measured) if measured else None,
            processing_class=tokenizer,
            peft_config=lora_of(model, config.rank),
        )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines())
    return trainer


def _loss(trainer: Trainer) -> float:
    return round(float(trainer.evaluate()["eval_loss"]), 4)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m training.thinker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, ThinkerConfig)
    try:
        given = sys.argv[1:] if argv is None else argv
        train(ThinkerConfig(**vars(parser.parse_args(argv))), _say, f"{parser.prog} {shlex.join(given)}")
    except GenrecError as error:
        _say(str(error))
        return 2
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
