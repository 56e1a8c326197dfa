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
import dataclasses
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
from genrec.errors import GenrecError, missing_package
from genrec.evaluation.report import provenance
from genrec.instructions.context import Chat, PromptWriter
from genrec.instructions.targets import target, titles_of
from genrec.io import read_json, sha256, write_json
from serving.models import ABOUT, find_model, quiet_transformers, whole_folder
from training.config import PROTOCOLS

if TYPE_CHECKING:
    from transformers import Trainer

Report = Callable[[str], None]
Example = dict[str, Chat]  # prompt and completion, as TRL wants a conversation

LEAST = 5  # events that a prompt is written from
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a Llama layer


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
        for name in ("horizon", "steps", "batch", "rank", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise GenrecError(f"{name} is {getattr(self, name)}; it must be at least 1")
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
    out, work = Path(config.out), Path(config.out).with_name(Path(config.out).name + ".work")
    path, base = find_model(config.model or None)
    if not Path(path).is_dir():
        raise GenrecError(f"{path} is no folder; fine-tuning needs the model on the disk, with its weights")
    template = prompts.load(config.prompt)
    identity = config.as_dict() | {"genrec": __version__, "prompt_version": template.version, "base": base}
    identity.pop("out")
    if out.exists() and any(out.iterdir()):
        if (out / ABOUT).is_file() and read_json(out / ABOUT).get("settings") == identity:
            report(f"{out} is there already, made with the same settings")
            return out
        raise GenrecError(f"{out} exists and was made with other settings; remove it or choose another --out")
    started = work / "config.json"
    if started.exists() and read_json(started) != identity:
        raise GenrecError(f"{work} holds a started run with other settings; remove it or choose another --out")
    write_json(started, identity)

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
    if checkpoint and step_of(checkpoint) == (config.stop or config.steps):  # training on would take a step too many
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
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
        import peft
        import trl
    except ImportError as error:
        raise missing_package(f"{error.name or 'trl'} (it fine-tunes the thinker)", "train") from error
    import torch
    from datasets import Dataset as Table
    from datasets import disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

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
    cuda = torch.cuda.is_available()
    set_seed(config.seed)  # the adapter is drawn before the trainer sets its own seed
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, number))
        arguments = trl.SFTConfig(
            output_dir=str(work / "checkpoints"),
            max_steps=config.steps,
            per_device_train_batch_size=config.batch,
            per_device_eval_batch_size=config.batch,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, config.steps // 15),
            completion_only_loss=True,
            max_length=None,
            packing=False,
            gradient_checkpointing=False,
            bf16=False,  # no autocast: the base is in `number` already, the adapter in float32
            use_cpu=not cuda,
            seed=config.seed,
            data_seed=config.seed,
            save_strategy="steps",
            save_steps=config.checkpoint_steps,
            save_total_limit=2,
            logging_steps=10,
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=cuda,
        )
        depth = int(model.config.num_hidden_layers)
        lora = peft.LoraConfig(
            r=config.rank,
            lora_alpha=2 * config.rank,
            lora_dropout=0.0,
            target_modules=MODULES,
            layers_to_transform=list(range(depth // 2, depth)),  # nothing is propagated back through the lower half
            bias="none",
            task_type="CAUSAL_LM",
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Table.from_list(taught),
            eval_dataset=Table.from_list(measured) if measured else None,
            processing_class=tokenizer,
            peft_config=lora,
        )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines())
    return trainer


def last_checkpoint(work: Path) -> Path | None:
    """The newest whole checkpoint; one that a kill cut off has no trainer_state.json, which is written last."""
    whole = [p.parent for p in (work / "checkpoints").glob("checkpoint-*/trainer_state.json") if _readable(p)]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step at which TRL wrote a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def _readable(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def _loss(trainer: Trainer) -> float:
    return round(float(trainer.evaluate()["eval_loss"]), 4)


def weights_digest(folder: Path) -> str:
    """sha256 over the digests of the folder's safetensors files, in order of name."""
    import hashlib

    return hashlib.sha256("".join(sha256(p) for p in sorted(folder.glob("*.safetensors"))).encode()).hexdigest()


def keep_adapter(trainer: Trainer, out: Path, about: dict[str, Any]) -> None:
    """Adapter weights in bfloat16, their configuration and the provenance; whole or not at all."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    model: Any = trainer.model
    weights = {
        k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in get_peft_model_state_dict(model).items()
    }
    settings = model.peft_config["default"].to_dict()
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items() if v is not None}
    settings |= {"base_model_name_or_path": about["base"]["model"], "inference_mode": True}
    with whole_folder(out) as temporary:
        save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "adapter_config.json", settings)
        write_json(temporary / ABOUT, about)
        if out.is_dir():
            out.rmdir()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m training.thinker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in dataclasses.fields(ThinkerConfig):
        needed = f.default is dataclasses.MISSING
        kind = {"str": str, "int": int, "float": float, "Path": Path}[str(f.type)]
        shown = "" if needed else f" (default: {f.default if f.default != '' else 'none'})"
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            dest=f.name,
            type=kind,
            required=needed,
            default=None if needed else f.default,
            choices=f.metadata.get("choices"),
            help=f.metadata["help"] + shown,
        )
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
