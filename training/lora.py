"""What both trainers of the thinker share (training.thinker, training.align_thinker): the LoRA and its base, TRL's
arguments, the folders of a run that may be killed, and the adapter that comes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from genrec.errors import GenrecError
from genrec.io import read_json, sha256, write_json
from serving.models import ABOUT, whole_folder

if TYPE_CHECKING:
    from argparse import ArgumentParser

Report = Callable[[str], None]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a Llama layer


class Settings(Protocol):
    """What the shared parts read of a config."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def checkpoint_steps(self) -> int: ...
    @property
    def seed(self) -> int: ...


def begun(out: Path, identity: dict[str, Any], report: Report) -> Path | None:
    """The work folder of a run that is new or goes on; None where the adapter is there already. Raises GenrecError for
    folders of other settings."""
    work = out.with_name(out.name + ".work")
    if out.exists() and any(out.iterdir()):
        if (out / ABOUT).is_file() and read_json(out / ABOUT).get("settings") == identity:
            report(f"{out} is there already, made with the same settings")
            return None
        raise GenrecError(f"{out} exists and was made with other settings; remove it or choose another --out")
    started = work / "config.json"
    if started.exists() and read_json(started) != identity:
        raise GenrecError(f"{work} holds a started run with other settings; remove it or choose another --out")
    return work


def base_model(path: str, number: str, **tokenizer: Any) -> tuple[Any, Any]:
    """(tokenizer, language model) of a folder; number: the dtype's name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = AutoTokenizer.from_pretrained(path, **tokenizer)
    return made, AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, number))


def arguments(config: Settings, work: Path) -> dict[str, Any]:
    """The arguments of both of TRL's trainers."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(work / "checkpoints"),
        "max_steps": config.steps,
        "learning_rate": config.learning_rate,
        "warmup_steps": max(1, config.steps // 15),
        "gradient_checkpointing": False,
        "bf16": False,  # no autocast: the base has its dtype already, the adapter is in float32
        "use_cpu": not cuda,
        "seed": config.seed,
        "data_seed": config.seed,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_steps,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": cuda,
    }


def lora_of(model: Any, rank: int) -> Any:
    """A LoRA of the upper half of the layers: nothing is propagated back through the lower half."""
    import peft

    depth = int(model.config.num_hidden_layers)
    return peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=MODULES,
        layers_to_transform=list(range(depth // 2, depth)),
        bias="none",
        task_type="CAUSAL_LM",
    )


def go_on(trainer: Any, checkpoint: Path | None, steps: int) -> None:
    """Trains to the end from a checkpoint. One of the last step is only read: else a step too many is taken."""
    if checkpoint and step_of(checkpoint) == steps:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = type(trainer.state).load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


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


def weights_digest(folder: Path) -> str:
    """sha256 over the digests of the folder's safetensors files, in order of name."""
    import hashlib

    return hashlib.sha256("".join(sha256(p) for p in sorted(folder.glob("*.safetensors"))).encode()).hexdigest()


def keep_adapter(trainer: Any, out: Path, about: dict[str, Any]) -> None:
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


def add_flags(parser: ArgumentParser, config: Any) -> None:
    """A flag for each field of a config dataclass."""
    import argparse

    kinds = {"str": str, "int": int, "float": float, "Path": Path}
    for f in dataclasses.fields(config):
        needed = f.default is dataclasses.MISSING
        shown = "" if needed else f" (default: {f.default if f.default != '' else 'none'})"
        flag, said = "--" + f.name.replace("_", "-"), f.metadata["help"] + shown
        if str(f.type) == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=said)
        else:
            parser.add_argument(
                flag,
                dest=f.name,
                type=kinds[str(f.type)],
                required=needed,
                default=None if needed else f.default,
                choices=f.metadata.get("choices"),
                help=said,
            )
