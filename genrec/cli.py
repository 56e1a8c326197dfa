"""The `genrec` command: thin, and importing nothing heavy before it runs.

    genrec demo                                        the main job on MovieLens-100K, then the page
    genrec fit --data FOLDER --out BUNDLE              from files to a bundle
    genrec recommend --bundle BUNDLE --user ID         a list; `genrec trace` says how it came about

Results go to stdout (with --json nothing but JSON), progress to stderr. Exit codes: 0 done; 2 wrong input, with one
line that says what and how to mend it; 1 a fault of genrec; 130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib
import json
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from genrec import __version__, commands, rank, terminal
from genrec.errors import GenrecError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; argparse's own exits (help, wrong flags) are SystemExit."""
    args = parser().parse_args(argv)
    terminal.quiet_libraries()
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except GenrecError as error:
        return _complain(str(error))
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # nothing is left to write to, not even at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        sys.stderr.write("genrec: interrupted; the same command goes on from what is finished\n")
        return 130
    except Exception as error:
        if _disk_full(error):
            return _complain(f"no space left on the disk ({error}); free some and run the same command again")
        traceback.print_exc()
        sys.stderr.write("genrec: this is a fault of genrec, not of your input; please report the lines above\n")
        return 1


def _disk_full(error: Exception) -> bool:
    """Whether this is a full disk: by number, or in the words of safetensors and Arrow, whose errors have none."""
    numbered = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return numbered or os.strerror(errno.ENOSPC) in str(error)


def _complain(message: str) -> int:
    sys.stderr.write(f"genrec: error: {terminal.plain(message, 2000)}\n")
    return 2


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(
        prog="genrec", description="Generative recommendation that thinks before it generates.", allow_abbrev=False
    )
    whole.add_argument("--version", action="version", version=f"genrec {__version__}")
    subcommands = whole.add_subparsers(metavar="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        made = subcommands.add_parser(name, help=about, description=about, allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    one = command(
        "demo", commands.demo, "the main job on MovieLens-100K: fit, instruct, table, a recommendation, the page"
    )
    _bundle(one)
    one.add_argument(
        "--users", type=_count, default=commands.DEMO_USERS, help="users who get an instruction (default: %(default)s)"
    )
    _model(one)
    one.add_argument("--no-ui", action="store_true", help="end without starting the page")
    _address(one)

    one = command("data", commands.data, "check a data source and say what is in it")
    one.add_argument("source", help="ml-100k, amazon14:FOLDER, hf:OWNER/NAME, a folder, or a file of interactions")
    one.add_argument("--save", type=Path, metavar="FOLDER", help="also keep the checked data set there")
    _json(one)

    one = command(
        "fit", commands.fit, "make a bundle: semantic IDs, tools, generator, fusion and report; a killed fit goes on"
    )
    _settings(one, "training.config", "FitConfig")
    _json(one)

    one = command(
        "align", commands.align, "align a bundle's generator to every scenario's reward; a killed alignment goes on"
    )
    _settings(one, "training.align_config", "AlignConfig")
    _json(one)

    one = command("instruct", commands.instruct, "let the language model write instructions for users, and store them")
    _bundle(one)
    who = one.add_mutually_exclusive_group()
    who.add_argument("--users", type=_count, metavar="N", help="the first N users (default: all)")
    who.add_argument("--user", action="append", metavar="ID", help="this user; may be repeated")
    who.add_argument(
        "--queries", type=Path, metavar="FILE", help="no users: say what these search texts mean, one a line"
    )
    one.add_argument("--scenario", default="home", help="what for (default: %(default)s)")
    one.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="the I-th of N parts of the users, for N jobs at once",
    )
    one.add_argument("--expire", type=_age, metavar="AGE", help="first delete what is older: 30d, 12h, 45m, 90s")
    _prompt(one)
    _model(one)
    _json(one)

    one = command("worker", commands.worker, "keep the instructions fresh while interactions arrive, stalest first")
    _bundle(one)
    one.add_argument(
        "--data", metavar="SOURCE", help="where interactions arrive (default: what the bundle was fitted on)"
    )
    one.add_argument(
        "--scenario",
        action="append",
        metavar="NAME",
        help="keep one for this scenario; may be repeated (default: home)",
    )
    one.add_argument(
        "--window",
        type=_positive,
        default=3,
        metavar="N",
        help="new events that make one stale (default: %(default)s)",
    )
    one.add_argument(
        "--max-age", type=_age, default="7d", metavar="AGE", help="stale when older (default: %(default)s)"
    )
    one.add_argument(
        "--expire", type=_age, default="30d", metavar="AGE", help="deleted when older (default: %(default)s)"
    )
    one.add_argument(
        "--tokens", type=_positive, metavar="N", help="tokens per hour, read and generated (default: no bound)"
    )
    one.add_argument(
        "--every", type=_age, default="5m", metavar="AGE", help="a round starts this often (default: %(default)s)"
    )
    one.add_argument("--once", action="store_true", help="one round, then end")
    _prompt(one)
    _model(one)
    _json(one)

    for name, run, about in (
        ("recommend", commands.recommend, "recommend items to a user, or to anyone by a history"),
        ("trace", commands.trace, "recommend, and show everything that led to it"),
    ):
        one = command(name, run, about)
        _bundle(one)
        asked = one.add_mutually_exclusive_group(required=True)
        asked.add_argument("--user", metavar="ID", help="a user of the data set")
        asked.add_argument(
            "--history", type=_ids, metavar="IDS", help="items, oldest first: a,b,c or a JSON list; may be ''"
        )
        one.add_argument("--scenario", default="home", help="where the request comes from (default: %(default)s)")
        one.add_argument("--trigger", metavar="ID", help="the item whose page it is (scenario item)")
        one.add_argument("--query", metavar="TEXT", help="what was searched for (scenario search)")
        one.add_argument(
            "--attribute",
            dest="attributes",
            action="append",
            type=_attribute,
            metavar="NAME=VALUE",
            help="what is known about the user, in place of the data set's; repeatable",
        )
        one.add_argument("--instruction", metavar="TEXT", help="what to look for, in place of the stored instruction")
        one.add_argument("--k", type=int, default=10, help="how many items (default: %(default)s)")
        one.add_argument("--allow", type=_ids, metavar="IDS", help="only these items")
        one.add_argument("--deny", type=_ids, default=[], metavar="IDS", help="none of these items")
        _json(one)

    one = command("tool", commands.tool, "ask one tool of a bundle: its items, its sentence, how it came to them")
    one.add_argument("name", help="a tool that the bundle holds, such as ebr, capts or markov")
    _bundle(one)
    asked = one.add_mutually_exclusive_group(required=True)
    asked.add_argument("--user", metavar="ID", help="a user of the data set")
    asked.add_argument("--history", type=_ids, metavar="IDS", help="items, oldest first: a,b,c or a JSON list")
    one.add_argument("--trigger", metavar="ID", help="the item whose page it is")
    one.add_argument("--query", metavar="TEXT", help="what was searched for, for tools that read it")
    one.add_argument("--k", type=_positive, default=10, help="how many items (default: %(default)s)")
    one.add_argument(
        "--alpha", type=float, help="ebr: a list by quotas; 0 shares it evenly over clusters, more follows"
    )
    one.add_argument(
        "--quota",
        action="append",
        metavar="N",
        help="capts: pairs of trigger and channel; ebr: CLUSTER=N of a list by quotas, repeatable",
    )
    one.add_argument(
        "--floor", action="append", metavar="CLUSTER=N", help="ebr: at least N of a list by quotas; repeatable"
    )
    one.add_argument("--policy", help="capts: learned, independent, recent, feedback, pinnersage or pdn")
    _json(one)

    one = command("eval", commands.evaluate, "the table of a bundle: floors, generator, fused, with intervals")
    one.add_argument(
        "--bundle",
        type=Path,
        nargs="+",
        default=[commands.DEMO_BUNDLE],
        metavar="BUNDLE",
        help="the bundle's folder; with --again several fits that differ in their seed, for one table of their means",
    )
    one.add_argument("--again", action="store_true", help="measure it anew (default: the table that the fit stored)")
    one.add_argument(
        "--scenario", default="home", help="with --again: whose requests are measured (default: %(default)s)"
    )
    one.add_argument(
        "--out", type=Path, metavar="FOLDER", help="with --again: keep report.json, report.md and plots there"
    )
    one.add_argument("--slices", action="store_true", help="also the slices by day, not only all requests")
    _json(one)

    rank.add(command, _model)

    one = command("ui", commands.ui, "start the page over a bundle")
    _bundle(one)
    _address(one)
    one.add_argument(
        "--ranker", type=Path, action="append", default=[], metavar="FOLDER",
        help="of `genrec rank`: show its view of every list; repeatable",
    )  # fmt: skip
    return whole


def _bundle(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--bundle", type=Path, default=commands.DEMO_BUNDLE, help="the bundle's folder (default: %(default)s)"
    )
    one.add_argument(
        "--store",
        default=os.environ.get("GENREC_STORE") or None,
        metavar="PLACE",
        help="the instruction store: a file, or redis://HOST:PORT/DB?prefix=NAME (default: $GENREC_STORE, else the "
        "bundle's own file)",
    )


def _json(one: argparse.ArgumentParser) -> None:
    one.add_argument("--json", action="store_true", help="print JSON, and nothing else on stdout")


def _model(one: argparse.ArgumentParser) -> None:
    backends = ("auto", "vllm", "transformers")
    one.add_argument("--backend", choices=backends, default="auto", help="auto takes vllm where it is installed")
    one.add_argument(
        "--model",
        help="language model: folder, adapter or hub name (default: packaged SmolLM2-135M); its name at an --endpoint",
    )
    one.add_argument(
        "--endpoint", metavar="URL", help="an OpenAI-compatible server, such as vllm serve; its key in GENREC_API_KEY"
    )
    one.add_argument(
        "--concurrency", type=_positive, default=32, metavar="N", help="requests to it at once (default: %(default)s)"
    )


def _prompt(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--prompt",
        help="prompt template, see python -m prompts (default: the adapter's own, else "
        f"{commands.PROMPT}; for --queries {commands.REWRITE})",
    )


def _address(one: argparse.ArgumentParser) -> None:
    one.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    one.add_argument("--port", type=_port, default=7860, help="port to serve on (default: %(default)s)")


def _settings(one: argparse.ArgumentParser, module: str, name: str) -> None:
    """A flag for every field of a config dataclass: name, type, default, choices and help are the field's."""
    config = getattr(importlib.import_module(module), name)
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        flag, kind = "--" + field.name.replace("_", "-"), kinds[field.name]
        said: dict[str, Any] = {"dest": field.name, "help": field.metadata["help"].replace("%", "%%")}
        if field.default is dataclasses.MISSING:
            said["required"] = True
        else:
            shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            said |= {"default": field.default, "help": f"{said['help']} (default: {shown if shown != '' else 'none'})"}
        if kind is bool:
            said["action"] = argparse.BooleanOptionalAction
        else:
            listed = typing.get_origin(kind) is tuple
            said |= {"type": _words if listed else kind, "metavar": "A,B" if listed else kind.__name__.upper()}
            if choices := field.metadata.get("choices"):
                said |= {"choices": choices, "metavar": None}
        one.add_argument(flag, **said)


def _ids(text: str) -> list[str]:
    """Identifiers out of "a,b,c" or a JSON list of strings (for identifiers with commas)."""
    if not text.lstrip().startswith("["):
        return list(_words(text))
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not a JSON list ({error})") from None
    if not all(isinstance(item, str | int) and not isinstance(item, bool) for item in found):
        raise argparse.ArgumentTypeError("a JSON list of item identifiers is expected")
    return [str(item) for item in found]


def _attribute(text: str) -> tuple[str, str]:
    """(name, value) out of "name=value"."""
    name, sign, value = text.partition("=")
    if not (sign and name.strip() and value.strip()):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not NAME=VALUE, as in age=24")
    return name, value


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    """(I, N) out of "I/N", 1 <= I <= N."""
    shard, _, shards = text.partition("/")
    if not (shard.isdecimal() and shards.isdecimal() and 0 < int(shard) <= int(shards)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard like 1/4, ..., 4/4")
    return int(shard), int(shards)


def _age(text: str) -> float:
    """Seconds out of "30d", "12h", "45m" or "90s"."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    if text[-1:] not in units or not text[:-1].isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no age like 30d, 12h, 45m or 90s")
    return float(int(text[:-1]) * units[text[-1]])


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return int(text)
