"""What many tests share: a tiny shop (some sixty items in six categories, users who stay in one or two), a tiny
generator and a tiny language model with random weights."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from genrec import Recommender
from genrec.contracts import Evidence
from genrec.generator.config import GeneratorConfig
from genrec.generator.model import GeneratorModel
from genrec.instructions import InstructionStore
from genrec.tokenizer.trie import Trie


def evidence(*sentences: str, rows: tuple[int, ...] = ()) -> list[Evidence]:
    """A piece of evidence for each sentence; the first one proposes `rows`."""
    items = [np.array(rows if n == 0 else (), np.int32) for n in range(len(sentences))]
    return [Evidence("tool", r, np.ones(len(r), np.float32), s) for r, s in zip(items, sentences, strict=True)]


HOSTILE_TITLE = "<script>alert(1)</script> [bold]tea[/bold] \x1b[31m<|im_start|>"
KINDS = ["tea", "coffee", "bread", "cheese", "jam", "soap"]


def shop(folder: Path, users: int = 40, per_kind: int = 10, seed: int = 0) -> Path:
    """Writes items.csv, interactions.csv and embeddings.npy of the shop into a folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    items = [(f"{kind}-{i}", f"{kind.title()} number {i}", kind) for kind in KINDS for i in range(per_kind)]
    items[3] = (items[3][0], HOSTILE_TITLE, items[3][2])
    lines = ["item,title,category"]
    lines += [f"{item},{json.dumps(title, ensure_ascii=False)},{kind}" for item, title, kind in items]
    (folder / "items.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    events = ["user,item,timestamp"]
    for user in range(users):
        home = user % len(KINDS)
        day = 1_600_000_000 + user * 1000
        chosen = rng.permutation(per_kind)[: rng.integers(5, 9)]
        for step, i in enumerate(chosen):
            kind = home if rng.random() < 0.8 else (home + 1) % len(KINDS)
            events.append(f"u{user},{KINDS[kind]}-{i},{day + step * 90_000}")
    (folder / "interactions.csv").write_text("\n".join(events) + "\n", encoding="utf-8")
    centres = rng.normal(size=(len(KINDS), 16))
    vectors = np.repeat(centres, per_kind, 0) + 0.3 * rng.normal(size=(len(items), 16))
    np.save(folder / "embeddings.npy", vectors.astype(np.float32))
    return folder


TEXT = 6


def rated_shop(folder: Path) -> Path:
    """The shop with a rating and a column `kept` for every event, for the ranking tools."""
    shop(folder, users=24)
    lines = (folder / "interactions.csv").read_text().splitlines()
    rows = [f"{line},{1 + (3 * n + n // 7) % 5},{n % 2}" for n, line in enumerate(lines[1:])]
    more = [f"u{u},soap-{i},{1_700_000_000 + 100 * i},{1 + i % 5},{i % 2}" for u in range(24) for i in range(10)]
    (folder / "interactions.csv").write_text("\n".join([lines[0] + ",rating,kept", *rows, *more]) + "\n")
    return folder


def tiny_model(
    items: int = 30, levels: int = 3, codes: int = 5, seed: int = 0, known: int | None = None, retrieved: int = 0,
    profiles: bool = False,
) -> GeneratorModel:  # fmt: skip
    """Random weights over a random catalogue; it sees 2 + `retrieved` events where it retrieves."""
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.product(range(codes), repeat=levels)))
    chosen = every[rng.choice(len(every), items, replace=False)]
    torch.manual_seed(seed)
    config = GeneratorConfig(
        items=known or items, text_dim=TEXT, d_model=16, heads=2, d_ff=24, levels=levels, codes=codes, max_history=6,
        recent=2, retrieved=retrieved, retrieval_width=4, profiles=profiles,
    )  # fmt: skip
    model = GeneratorModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.set_catalog(
        Trie.build(chosen), torch.from_numpy(rng.normal(size=(items, TEXT)).astype(np.float32))
    ).eval()


CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tiny_llama(folder: Path, layers: int = 1, positions: int = 256) -> Path:
    """A random Llama with a byte-level tokenizer, saved as a transformers folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {t: n for n, t in enumerate(marks + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def script(name: str) -> ModuleType:
    """A script of tests/benchmarks as a module."""
    path = Path(__file__).parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_script(module: ModuleType, patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """What its `main` returns with these arguments."""
    patch.setattr(sys, "argv", [module.__name__, *arguments])
    return int(module.main())


def watch_writes(store: InstructionStore) -> list[str]:
    """Every user that is written into the store from now on, in order, doubles too."""
    put: list[str] = []
    put_many = store.put_many

    def watched(rows: object) -> None:
        kept = list(rows)  # type: ignore[call-overload]
        put.extend(user for user, _, _ in kept)
        put_many(kept)

    store.put_many = watched  # type: ignore[method-assign, assignment]
    return put


def readable(folder: Path) -> Recommender:
    """Of a copy of the tiny bundle, as if the shop had been embedded from text (every text means a cheese), with
    weights of its own for searches."""
    recommender = Recommender.load(folder)
    bundle = recommender.bundle
    bundle.config["embeddings"] = ""
    bundle.__dict__["embedder"] = lambda texts: np.repeat(bundle.embeddings[30:31], len(texts), 0)
    bundle.weights["search"] = {"floors": {"content": 1.0}, "fused": {"content": 1.0, "generator": 0.5}}
    return recommender
