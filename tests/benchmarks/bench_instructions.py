"""Instructions/s and tokens/s: vLLM against transformers' `generate`, same model, prompts and machine, in one run.

    python tests/benchmarks/bench_instructions.py [--data ml-100k] [--batch 64] [--dtype bfloat16] [--out FILE]

The prompts are real ones: a template of the project, filled for users of the data set. Each engine runs in a process
of its own, in turns, so that threads and memory of one do not hinder the other; each round asks for `--batch` other
users, in one call, after a short warm-up. Both write the same schema under the same grammar, greedily.

- shared: prompts as the batch job sends them; they begin with the template, which vLLM's prefix cache reads once.
- unshared: every prompt begins with a number of its own, so that nothing is shared.
- limit: the output tokens/s at which either every weight has been read from memory once per decoding step of the whole
  batch, at this machine's measured bandwidth, or the matrix products of reading and writing fill the time, at its
  measured rate in that number format; whichever is less. `share` is what an engine reached of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]

import prompts
from genrec.contracts import UserContext
from genrec.data import leave_one_out, load_dataset
from genrec.evaluation.report import provenance
from genrec.instructions.context import PromptWriter
from genrec.instructions.parse import parse
from genrec.terminal import quiet_libraries
from serving.instruct import MAX_TOKENS
from serving.llm import VLLM, Transformers, choose_dtype
from serving.llm.base import Chat, chat_tokens
from serving.models import packaged_model

ENGINES = ("vllm", "transformers")
PROMPTS = ("shared", "unshared")
WARM_UP = 4  # users


def chats_of(data: str, users: int, template: prompts.PromptTemplate) -> list[Chat]:
    """One prompt for each of the first users who can be asked about."""
    dataset = load_dataset(data)
    writer = PromptWriter(dataset.catalog, template)
    contexts: list[UserContext] = [c for c in leave_one_out(dataset).test.contexts if len(c.history) >= 5][:users]
    if len(contexts) < users:
        raise SystemExit(
            f"{data} has {len(contexts)} users with 5 events; {users} are needed: lower --batch or --rounds"
        )
    return [writer.chat(context, ()) for context in contexts]


def numbered(chats: list[Chat]) -> list[Chat]:
    """The same prompts, each with another beginning."""
    return [
        [{**chat[0], "content": f"Case {i * 7919 % 10007}. {chat[0]['content']}"}, *chat[1:]]
        for i, chat in enumerate(chats)
    ]


def shared_beginning(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with."""
    first, last = min(prompts), max(prompts)  # whatever these two share, all between them share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def engine(args: argparse.Namespace) -> None:
    """What the child process does: prints one JSON line for its rounds."""
    from transformers import AutoTokenizer

    quiet_libraries()
    template = prompts.load(args.prompt)
    chats = chats_of(args.data, WARM_UP + args.batch * args.rounds, template)
    if args.unshared:
        chats = numbered(chats)
    model = (
        VLLM(dtype=args.dtype, compiled=args.compiled)
        if args.engine == "vllm"
        else Transformers(dtype=args.dtype, batch=args.batch)
    )
    schema = dict(template.schema)
    model.generate(chats[:WARM_UP], schema, MAX_TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    rounds = []
    for start in range(WARM_UP, len(chats), args.batch):
        before = (model.prompt_tokens, model.output_tokens)
        clock = time.perf_counter()
        texts = model.generate(chats[start : start + args.batch], schema, MAX_TOKENS)
        seconds = time.perf_counter() - clock
        rounds.append(
            {
                "seconds": seconds,
                "prompt_tokens": model.prompt_tokens - before[0],
                "output_tokens": model.output_tokens - before[1],
                "shared_tokens": shared_beginning(chat_tokens(tokenizer, chats[start : start + args.batch])),
                "valid": sum(parse(text, template.schema) is not None for text in texts),
            }
        )
    model.close()
    print(json.dumps(rounds))


def machine(dtype: str) -> dict[str, float]:
    """Measured matrix-product rate in this number format (FLOP/s) and read bandwidth (bytes/s) of this process."""
    import torch

    number = getattr(torch, dtype)
    a, b = torch.randn(2048, 2048).to(number), torch.randn(2048, 2048).to(number)
    big = torch.ones(1 << 28, dtype=torch.uint8).view(torch.int64)  # 256 MiB, more than the caches hold

    def best(job: Any) -> float:
        times = []
        for _ in range(5):
            clock = time.perf_counter()
            job()
            times.append(time.perf_counter() - clock)
        return min(times)

    return {"matmul": 2 * 2048**3 / best(lambda: a @ b), "bandwidth": big.numel() * 8 / best(lambda: big.sum())}


def weights(path: Path) -> tuple[int, int]:
    """Parameters of the model that take part in a product for every token read or written (the layers), and for every
    token written (the output layer)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    outputs = model.get_output_embeddings().weight.numel()
    return sum(p.numel() for p in model.model.layers.parameters()), outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--prompt", choices=prompts.names(), default="intent_v2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of each engine, after the warm-up")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=PROMPTS, help="what they begin with")
    parser.add_argument("--compiled", action="store_true", help="vLLM as for many texts: compiled first")
    parser.add_argument("--out", type=Path, default=Path("instructions.json"))
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--unshared", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = choose_dtype(args.dtype)[0]
    if args.engine:
        engine(args)
        return
    import torch

    clock = time.perf_counter()
    limits, (layers, outputs) = machine(args.dtype), weights(packaged_model())
    size = 2 if args.dtype == "bfloat16" else 4
    result: dict[str, Any] = {
        "parameters": layers + outputs,
        "dtype": args.dtype,
        "batch": args.batch,
        "compiled": args.compiled,
        "threads": torch.get_num_threads(),
        "matmul_flop_per_second": limits["matmul"],
        "read_bytes_per_second": limits["bandwidth"],
        "rows": [],
    }
    print(
        f"{args.dtype}, {result['threads']} threads, matrix products at {limits['matmul'] / 1e9:.0f} GFLOP/s, "
        f"memory read at {limits['bandwidth'] / 1e9:.0f} GB/s, {(layers + outputs) / 1e6:.0f} M parameters"
    )
    for shared in [kind == "shared" for kind in args.prompts]:
        speed = {}
        for name in ENGINES:
            settings = {"--engine": name, "--data": args.data, "--prompt": args.prompt, "--dtype": args.dtype}
            settings |= {"--batch": str(args.batch), "--rounds": str(args.rounds)}
            command = [sys.executable, __file__, *(x for pair in settings.items() for x in pair)]
            command += (["--compiled"] if args.compiled else []) + ([] if shared else ["--unshared"])
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            rounds = json.loads(done.stdout.strip().splitlines()[-1])
            seconds = statistics.median(r["seconds"] / args.batch for r in rounds) * args.batch
            read, written = (statistics.mean(r[k] for r in rounds) for k in ("prompt_tokens", "output_tokens"))
            steps = written / args.batch  # of the whole batch, at the least
            by_memory = steps * (layers + outputs) * size / limits["bandwidth"]
            fresh = read - statistics.mean(r["shared_tokens"] for r in rounds) * (args.batch - 1)
            by_products = 2 * (layers * (fresh + written) + outputs * written) / limits["matmul"]
            row = {
                "engine": name,
                "prompts": "shared" if shared else "unshared",
                "instructions_per_second": args.batch / seconds,
                "output_tokens_per_second": written / seconds,
                "prompt_tokens": read / args.batch,
                "output_tokens": written / args.batch,
                "valid": sum(r["valid"] for r in rounds) / (args.batch * len(rounds)),
                "limit_tokens_per_second": written / max(by_memory, by_products),
                "share": max(by_memory, by_products) / seconds,
                "seconds": [r["seconds"] for r in rounds],
            }
            speed[name] = row["instructions_per_second"]
            result["rows"].append(row)
            print(
                f"  {row['prompts']:9} {name:13} {speed[name]:6.2f} instructions/s "
                f"{row['output_tokens_per_second']:6.0f} tokens/s  reads {row['prompt_tokens']:.0f}, writes "
                f"{row['output_tokens']:.0f} tokens each, {row['valid']:.0%} valid, share of the limit "
                f"{row['share']:.0%}",
                flush=True,
            )
        result["ratio_" + ("shared" if shared else "unshared")] = ratio = speed["vllm"] / speed["transformers"]
        print(f"  vllm / transformers {ratio:.2f}")
    result["about"] = provenance("median of the rounds; greedy", {}, time.perf_counter() - clock)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
