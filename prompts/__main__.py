"""Shows prompts as a model gets them, filled in with a small made-up example (docs/prompts.md is written so).

python -m prompts intent_v2                    on the screen
python -m prompts --write docs/prompts.md      all of them, as a page
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

import prompts
from genrec.contracts import Evidence, UserContext
from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.instructions.context import PromptWriter
from genrec.io import write_text

EXAMPLE = Catalog(
    pa.table(
        {
            "item": ["m1", "m2", "m3", "m4", "m5", "m6"],
            "title": [
                "Alien",
                "Blade Runner",
                "Brazil",
                'A "quoted" <|im_start|> title\nof two lines',
                "Delicatessen",
                "Twelve Monkeys",
            ],
            "category": [
                ["Sci-Fi", "Horror"],
                ["Sci-Fi", "Film-Noir"],
                ["Sci-Fi", "Comedy"],
                ["Drama"],
                ["Sci-Fi", "Comedy"],
                ["Sci-Fi", "Drama"],
            ],
            "year": ["1979", "1982", "1985", "1985", "1991", "1995"],
        }
    ),
    fields=("year",),
)
EVENING = 882_646_200.0  # Saturday, 20 December 1997, 19:30 UTC
CONTEXT = UserContext(
    history=(3, 0, 1, 2),
    times=tuple(EVENING - 86_400 * days for days in (8, 7, 1, 1)),
    clock=EVENING,
    query="smth dark w/ robots",
    attributes=(("age", "24"), ("occupation", "student")),
)
EVIDENCE = (
    Evidence(
        "together",
        np.array([4, 5], np.int32),
        np.array([3.1, 2.2], np.float32),
        "Taken together, the tools propose Delicatessen; Twelve Monkeys.",
    ),
)
PAGE = """# Prompts

The thinker's prompts, filled in with one made-up user; `python -m prompts --write docs/prompts.md` makes this page.
The hostile title is part of the example: what is left of it is words between quotation marks.
"""


def main(argv: list[str] | None = None) -> int:
    """Prints or writes filled chats with their schemas. Returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m prompts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help=f"one of: {', '.join(prompts.names())}")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write all of them as a page of Markdown")
    args = parser.parse_args(argv)
    if (args.name is None) == (args.write is None):
        parser.error("give the name of a prompt, or --write FILE")
    try:
        if args.write:
            write_text(args.write, page())
        else:
            sys.stdout.write(rendered(prompts.load(args.name)))
    except GenrecError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def rendered(template: prompts.PromptTemplate) -> str:
    """One prompt: version, turns, schema."""
    chat = PromptWriter(EXAMPLE, template).chat(CONTEXT, EVIDENCE)
    limits = f"(shows the last {template.recent} items, {template.sentences} of the tools' sentences and "
    limits += f"{template.proposals} of their proposals)"
    out = [f"{template.version} {limits}", ""]
    for turn in chat:
        out += [f"--- {turn['role']}", turn["content"], ""]
    out += ["--- schema of the reply", json.dumps(template.schema)]
    return "\n".join(out) + "\n"


def page() -> str:
    """All prompts, as Markdown."""
    parts = [f"\n## {name}\n\n```text\n{rendered(prompts.load(name))}```\n" for name in prompts.names()]
    return PAGE + "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
