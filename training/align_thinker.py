"""Aligns the thinker: TRL's GRPOTrainer with a peft LoRA and the SA-GCPO loss, on what its instructions are worth.

    python -m training.align_thinker --bundle bundles/ml-100k --model ml-100k-v2 --out serving/adapters/ml-100k-rl

A prompt is a training position, chosen and written as in training.thinker; a completion is an instruction; its reward
(genrec.alignment.instruction_rewards) is how much it helps the frozen generator of the bundle to find what the user
really chose next, how near it is to that item, whether it follows the schema, is grounded in what was shown, and brief.
The floor of SA-GCPO is the reward of the instruction that would have been right (genrec.instructions.targets).

TRL 1.16 behaviours that this stands on, pinned by tests but for what only several processes can show (they are private:
the minor version is pinned too):
- log pi_old is computed only where gradient_accumulation_steps % (steps_per_generation * num_iterations) != 0; else
  every ratio is 1 and no gate does anything. With one accumulation step, `updates` of 2 or more make it so.
- `_compute_loss` gets advantages of shape (B,) and must divide by the accumulation steps itself.
- `_calculate_rewards` returns the rewards of all processes; the advantages that
  `_generate_and_score_completions` returns are this process's slice of the groups, standardised with Bessel's
  deviation + 1e-4; a completion without any reward has advantage 0.
- a model with a new adapter starts as the base model (LoRA's B is 0), so the first rollouts are the base's.

Rollouts come from transformers' generate; `vllm` takes TRL's colocated vLLM instead, for CUDA (on a CPU its weight
synchronisation fails; not tested here). A killed run that is started again goes on at its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import prompts
from genrec import __version__
from genrec.alignment import instruction_rewards as parts_of
from genrec.alignment.advantages import suppressed
from genrec.alignment.losses import sa_gcpo
from genrec.bundle import MANIFEST, Bundle
from genrec.contracts import Instruction, UserContext
from genrec.errors import GenrecError, check_least, missing_package
from genrec.evaluation.intervals import bootstrap
from genrec.evaluation.report import provenance
from genrec.instructions import parse, quality
from genrec.instructions.attributes import Attributes
from genrec.instructions.context import Chat, PromptWriter
from genrec.instructions.targets import target, titles_of
from genrec.io import read_json, sha256, write_json
from genrec.tokenizer.embeddings import embed_texts
from serving.models import find_model, prompt_of, quiet_transformers
from training.fit import SPLITS
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
from training.thinker import ThinkerConfig, positions

if TYPE_CHECKING:
    from torch import Tensor

Report = Callable[[str], None]
PARTS = ("help", "near", "valid", "grounded", "brief")
SAMPLES = 12  # texts that are kept to be read


@dataclass(frozen=True)
class AlignThinkerConfig:
    """One alignment. Each field is a flag; its `help` is the flag's. All defaults are ours."""

    bundle: Path = field(metadata={"help": "whose generator and data judge the instructions"})
    out: Path = field(metadata={"help": "the adapter's folder"})
    model: str = field(default="", metadata={"help": "what to align: a folder, adapter or hub name (none: packaged)"})
    prompt: str = field(
        default="", metadata={"help": "see python -m prompts (none: the adapter's own, else intent_v2)"}
    )
    later: int = field(default=30, metadata={"help": "last training events of each user kept from the thinker"})
    steps: int = field(default=60, metadata={"help": "optimiser steps"})
    prompts_per_step: int = field(default=2, metadata={"help": "positions in each step"})
    group: int = field(default=6, metadata={"help": "instructions written for each position"})
    updates: int = field(default=2, metadata={"help": "optimiser steps on each batch of instructions, at least 2"})
    temperature_positive: float = field(default=2.0, metadata={"help": "tau+ of the gate"})
    temperature_negative: float = field(default=1.0, metadata={"help": "tau- of the gate"})
    floor: bool = field(default=True, metadata={"help": "the right instruction's reward as floor"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate"})
    rank: int = field(default=8, metadata={"help": "rank of the LoRA"})
    tokens: int = field(default=96, metadata={"help": "most tokens of a reply"})
    held_out: int = field(default=64, metadata={"help": "users without positions, to measure before and after"})
    help_weight: float = field(default=0.6, metadata={"help": "weight of: log-probability gained"})
    near_weight: float = field(default=0.2, metadata={"help": "weight of: likeness to the next item"})
    valid_weight: float = field(default=0.1, metadata={"help": "weight of: the schema is followed"})
    grounded_weight: float = field(default=0.05, metadata={"help": "weight of: words that were shown"})
    brief_weight: float = field(default=0.05, metadata={"help": "weight of: not longer than need be"})
    vllm: bool = field(default=False, metadata={"help": "write with TRL's colocated vLLM (CUDA)"})
    checkpoint_steps: int = field(default=10, metadata={"help": "steps between checkpoints"})
    dtype: str = field(default="auto", metadata={"help": "of the base: auto, float32 or bfloat16"})
    seed: int = field(default=0, metadata={"help": "of everything random"})

    def __post_init__(self) -> None:
        least = {"steps": 1, "prompts_per_step": 1, "group": 2, "rank": 1, "tokens": 8, "checkpoint_steps": 1}
        check_least(self, least | {"held_out": 0, "later": 0, "seed": 0})
        if self.updates < 2:
            raise GenrecError(f"updates is {self.updates}; below 2 every ratio is 1 and the gate does nothing")
        if self.checkpoint_steps % self.updates:
            raise GenrecError(
                f"checkpoint_steps is {self.checkpoint_steps}; it must be a multiple of updates ({self.updates}): "
                "TRL keeps no batch of instructions over a restart"
            )
        for name in ("learning_rate", "temperature_positive", "temperature_negative"):
            if not getattr(self, name) > 0:
                raise GenrecError(f"{name} is {getattr(self, name)}; it must be above 0")
        if min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise GenrecError(f"the reward's weights are {self.weights}; they must be 0 or more, and not all 0")

    @property
    def weights(self) -> dict[str, float]:
        return {name: getattr(self, f"{name}_weight") for name in PARTS}

    def as_dict(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class Position:
    """One training position: the request, the prompt that is written for it, what the user chose next, and the titles
    that an instruction which is right may take over from what the tools propose (genrec.instructions.targets)."""

    context: UserContext
    chat: Chat
    wanted: int
    user: int
    titles: Sequence[str] = ()


class Examiner:
    """The frozen generator with what it needs to judge instructions."""

    def __init__(self, bundle: Bundle, template: prompts.PromptTemplate) -> None:
        if bundle.config["embeddings"]:
            raise GenrecError(f"{bundle.folder} was fitted on own embeddings: its generator reads no instructions")
        self.bundle, self.template = bundle, template
        self.model = bundle.generator
        self.writer = PromptWriter(bundle.dataset.catalog, template)

    def positions(self, points: Sequence[tuple[int, int]], seed: int = 0) -> list[Position]:
        """The positions (user, events known) of training sequences. What the tools propose there, where the prompt
        shows it, comes from tools that were not fitted on the user; seed deals the users into folds."""
        from training.instructions import evidence_at

        dataset = self.bundle.dataset
        split = SPLITS[self.bundle.config["protocol"]](dataset)
        shown = self.template.proposals and len(points)
        said = evidence_at(dataset, split, list(points), seed) if shown else [()] * len(points)
        found = []
        for (u, n), evidence in zip(points, said, strict=True):
            context = split.train.context(u, n)
            wanted = int(split.train.items[int(split.train.offsets[u]) + n])
            titles = titles_of(self.writer.proposed(evidence), [wanted], dataset.catalog)
            found.append(Position(context, self.writer.chat(context, evidence), wanted, u, titles))
        return found

    def right(self, position: Position) -> Instruction | None:
        """The instruction that would have been right; None where the next item has no label."""
        shown, about = position.chat[-1]["content"], self.writer.attributes
        return target(position.context, [position.wanted], shown, about, self.template.schema, position.titles)

    def judge(self, instructions: Sequence[Instruction | None], asked: Sequence[Position]) -> dict[str, np.ndarray]:
        """Every part of the reward, float64 [B] each."""
        contexts, wanted = [p.context for p in asked], np.array([p.wanted for p in asked], np.int64)
        vectors = np.full((len(asked), self.model.config.text_dim), np.nan, np.float32)
        said = [b for b, i in enumerate(instructions) if i is not None]
        if said:
            texts = [i.look_for for i in instructions if i is not None]
            vectors[said] = embed_texts(self.bundle.embedder, texts)
        gain = parts_of.log_probability_gain(self.model, contexts, wanted, vectors)
        likeness = parts_of.target_likeness(self.model, contexts, wanted, vectors)
        return {
            "help": parts_of.helps(gain, instructions),
            "near": parts_of.near(likeness, instructions),
            "valid": parts_of.valid(instructions),
            "grounded": parts_of.grounded(instructions, [p.chat[-1]["content"] for p in asked]),
            "brief": parts_of.brief(instructions),
        }

    def intent_hits(self, instructions: Sequence[Instruction | None], asked: Sequence[Position]) -> np.ndarray:
        """float64 [B], as genrec.instructions.quality defines it; 0 for an invalid reply."""
        items = self.bundle.embeddings / np.linalg.norm(self.bundle.embeddings, axis=1, keepdims=True)
        vectors = np.zeros((len(asked), items.shape[1]), np.float32)
        said = [b for b, i in enumerate(instructions) if i is not None]
        if said:
            vectors[said] = embed_texts(self.bundle.embedder, [i.look_for for i in instructions if i is not None])
        attributes = Attributes(self.bundle.dataset.catalog)
        wanted = np.array([p.wanted for p in asked])
        hits = quality.intent_hits(vectors, [p.context for p in asked], wanted, items, attributes)
        return np.where(parts_of.valid(instructions) > 0, hits, 0.0)


def reward_functions(examiner: Examiner, asked: Sequence[Position]) -> list[Callable[..., list[float]]]:
    """One function for each of PARTS, as TRL calls them: completions and the column `position`, an index of `asked`.

    All are computed together, once for a batch of completions.
    """
    kept: dict[str, Any] = {"key": None, "parts": {}}

    def batch(completions: Sequence[Any], position: Sequence[int]) -> dict[str, np.ndarray]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        key = (tuple(texts), tuple(position))
        if kept["key"] != key:
            said = [parse(text, examiner.template.schema) for text in texts]
            kept["key"], kept["parts"] = key, examiner.judge(said, [asked[i] for i in position])
        found: dict[str, np.ndarray] = kept["parts"]
        return found

    def make(name: str) -> Callable[..., list[float]]:
        def reward(completions: Sequence[Any], position: Sequence[int], **_: Any) -> list[float]:
            return batch(completions, position)[name].tolist()

        reward.__name__ = name
        return reward

    return [make(name) for name in PARTS]


def floors(examiner: Examiner, asked: Sequence[Position], weights: dict[str, float]) -> list[float]:
    """R* of each position: the weighted reward of the right instruction, NaN where there is none."""
    right = [examiner.right(p) for p in asked]
    parts = examiner.judge(right, asked)
    total = sum(weights[name] * parts[name] for name in PARTS)
    return [float(x) if i is not None else float("nan") for x, i in zip(np.asarray(total), right, strict=True)]


def trainer_class(config: AlignThinkerConfig) -> type:
    """TRL's GRPOTrainer with SA-GCPO in place of its loss, and the target floor on its advantages."""
    import torch
    import trl

    class SAGCPOTrainer(trl.GRPOTrainer):  # type: ignore[misc, name-defined, unused-ignore]
        """The dataset has the columns prompt, position and floor."""

        def _calculate_rewards(self, inputs: Any, *rest: Any) -> Tensor:
            found = super()._calculate_rewards(inputs, *rest)
            weights = self.reward_weights.to(found.device)
            self._own = (found * weights).nansum(1)
            floor = torch.tensor([float(x["floor"]) for x in inputs], device=found.device, dtype=found.dtype)
            self._floor = self.accelerator.gather(floor)
            return found

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            if config.floor:
                advantages = output["advantages"]
                mine = slice(
                    self.accelerator.process_index * len(advantages),
                    (self.accelerator.process_index + 1) * len(advantages),
                )
                own, floor = self._own[mine, None], self._floor[mine]
                none = torch.zeros_like(own, dtype=torch.bool)
                zeroed = suppressed(advantages[:, None], own, floor, none)[:, 0]
                whole: Any = self.model
                mode = "train" if whole.training else "eval"
                share = zeroed.sum() / (advantages > 0).sum().clamp(min=1)
                self._metrics[mode]["suppressed"].append(float(share))
                output["advantages"] = advantages.masked_fill(zeroed, 0.0)
            return output

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            keep, mask = inputs["completion_ids"].size(1), inputs["completion_mask"].bool()
            new, entropies, _ = self._get_per_token_logps_and_entropies(
                model, ids, attention, keep, compute_entropy=True
            )
            old = inputs.get("old_per_token_logps")
            if old is None:
                raise GenrecError("TRL kept no old log-probabilities: every ratio would be 1 and the gate inert")
            taus = (config.temperature_positive, config.temperature_negative)
            loss = sa_gcpo(new, old, inputs["advantages"], mask, *taus)
            training = bool(model.training)
            said = self._metrics["train" if training else "eval"]
            ratio = (new.detach() - old)[mask].exp()
            said["entropy"].append(float(entropies.detach()[mask].mean()))
            said["ratio_mean"].append(float(ratio.mean()))
            said["ratio_largest"].append(float(ratio.max()))
            return loss / (self.current_gradient_accumulation_steps if training else 1.0)

    return SAGCPOTrainer


def make_trainer(
    path: str, examiner: Examiner, asked: list[Position], config: AlignThinkerConfig, work: Path, report: Report
) -> Any:
    """The trainer over these positions, ready to train."""
    try:
        import peft  # noqa: F401
        import trl
    except ImportError as error:
        raise missing_package(f"{error.name or 'trl'} (it aligns the thinker)", "train") from error
    from datasets import Dataset as Table
    from datasets import disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback, set_seed

    from serving.llm import choose_dtype

    class Lines(TrainerCallback):
        """Every step's figures as a line of progress and a JSON line."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "reward" not in logs:
                return
            shown = f"reward {logs['reward']:.3f}, suppressed {logs.get('suppressed', 0):.0%}"
            report(f"thinker: {state.global_step} of {config.steps} steps, {shown}")

    number, why = choose_dtype(config.dtype)
    report(f"thinker: {number} ({why})")
    disable_progress_bars()
    set_seed(config.seed)
    rows = floors(examiner, asked, config.weights) if config.floor else [float("nan")] * len(asked)
    table = Table.from_list([{"prompt": p.chat, "position": i, "floor": rows[i]} for i, p in enumerate(asked)])
    with quiet_transformers():
        tokenizer, model = base_model(path, number, padding_side="left")
        settings = trl.GRPOConfig(
            **arguments(config, work),
            per_device_train_batch_size=config.prompts_per_step * config.group,
            num_generations=config.group,
            gradient_accumulation_steps=1,
            num_iterations=config.updates,
            max_completion_length=config.tokens,
            reward_weights=list(config.weights.values()),
            lr_scheduler_type="constant_with_warmup",
            beta=0.0,
            use_vllm=config.vllm,
            vllm_mode="colocate",
            logging_steps=1,
        )
        trainer = trainer_class(config)(
            model=model,
            reward_funcs=reward_functions(examiner, asked),
            args=settings,
            train_dataset=table,
            processing_class=tokenizer,
            peft_config=lora_of(model, config.rank),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines())
    return trainer


def write(trainer: Any, asked: Sequence[Position], tokens: int, batch: int = 16) -> list[str]:
    """Greedy replies of the model as it is, without a grammar."""
    import torch

    model, tokenizer = trainer.model, trainer.processing_class
    before, out = model.training, []
    model.eval()
    for start in range(0, len(asked), batch):
        chats = [p.chat for p in asked[start : start + batch]]
        text = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        given = tokenizer(text, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.no_grad():
            made = model.generate(**given, do_sample=False, max_new_tokens=tokens)
        out += tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(before)
    return out


def measure(trainer: Any, examiner: Examiner, asked: Sequence[Position], config: AlignThinkerConfig) -> dict[str, Any]:
    """Reward by part and intent hit at held-out positions, each with a 95 % interval over users, and some texts."""
    texts = write(trainer, asked, config.tokens)
    said = [parse(text, examiner.template.schema) for text in texts]
    parts = examiner.judge(said, asked)
    whole = sum(config.weights[name] * parts[name] for name in PARTS)
    values = parts | {"reward": np.asarray(whole), "intent hit": examiner.intent_hits(said, asked)}
    found = bootstrap(np.stack(list(values.values()), 1), np.array([p.user for p in asked]))
    figures = {
        name: {k: round(v, 4) if np.isfinite(v) else None for k, v in vars(i).items()}
        for name, i in zip(values, found, strict=True)
    }
    samples = [{"shown": p.chat[-1]["content"], "said": t} for p, t in zip(asked[:SAMPLES], texts, strict=False)]
    return {"figures": figures, "samples": samples}


def align(config: AlignThinkerConfig, report: Report = print, command: str | None = None) -> Path:
    """The finished adapter's folder, with before.json and after.json beside its weights; one that was made with the
    same settings is returned as it is."""
    out = Path(config.out)
    path, base = find_model(config.model or None)
    if not Path(path).is_dir():
        raise GenrecError(f"{path} is no folder; aligning needs the model on the disk, with its weights")
    template = prompts.load(config.prompt or prompt_of(config.model or None) or "intent_v2")
    bundle = Bundle.load(config.bundle)
    identity = {k: v for k, v in config.as_dict().items() if k not in ("out", "bundle")}
    identity |= {"genrec": __version__, "prompt": template.name, "prompt_version": template.version, "base": base}
    identity |= {"bundle": sha256(config.bundle / MANIFEST)}
    work = begun(out, identity, report)
    if work is None:
        return out
    examiner = Examiner(bundle, template)
    write_json(work / "config.json", identity)
    split = SPLITS[bundle.config["protocol"]](bundle.dataset)
    plan = ThinkerConfig(
        data="", out=out, later=config.later, horizon=1, steps=config.steps, batch=config.prompts_per_step,
        held_out=config.held_out, seed=config.seed,
    )  # fmt: skip
    to_train, to_measure = positions(split, plan)
    every = examiner.positions([*to_train, *to_measure], config.seed)
    asked, measured = every[: len(to_train)], every[len(to_train) :]
    report(f"thinker: {len(asked):,} positions of {len({p.user for p in asked}):,} users, {len(measured)} held out")
    clock = time.perf_counter()
    made = provenance(f"{bundle.dataset.name}, {bundle.config['protocol']}", {"seed": config.seed}, 0.0, command)
    trainer = make_trainer(path, examiner, asked, config, work, report)
    if measured and not (work / "before.json").exists():
        write_json(work / "before.json", measure(trainer, examiner, measured, config))
    checkpoint = last_checkpoint(work)
    if checkpoint:
        report(f"thinker: goes on at {checkpoint.name}")
    go_on(trainer, checkpoint, config.steps)
    results: dict[str, Any] = {"log": [line for line in trainer.state.log_history if "reward" in line]}
    if measured:
        results |= {"before": read_json(work / "before.json"), "after": measure(trainer, examiner, measured, config)}
    model = str(Path(path).resolve()) if config.model and Path(config.model).is_dir() else config.model or base
    about = {
        "settings": identity,
        "base": {"name": base, "model": model, "sha256": weights_digest(Path(path))},
        "positions": len(asked),
        "figures": {k: results[k]["figures"] for k in ("before", "after") if k in results},
        "resumed": checkpoint is not None,
    }
    keep_adapter(trainer, out, about | made | {"seconds": round(time.perf_counter() - clock, 1)})
    write_json(out / "alignment.json", json.loads(json.dumps(results, default=float)))
    shutil.rmtree(work)
    report(f"{out}: {about['figures']}")
    return out


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m training.align_thinker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, AlignThinkerConfig)
    try:
        given = sys.argv[1:] if argv is None else argv
        align(AlignThinkerConfig(**vars(parser.parse_args(argv))), _say, f"{parser.prog} {shlex.join(given)}")
    except GenrecError as error:
        _say(str(error))
        return 2
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
