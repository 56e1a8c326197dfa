"""Shows a prompt as a model gets it: `python -m prompts intent_v1`, filled in with a small made-up example."""

from __future__ import annotations

import argparse
import json
import sys

import pyarrow as pa

import prompts
from genrec.contracts import UserContext
from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.instructions.context import PromptWriter

EXAMPLE = Catalog(
    pa.table(
        {
            "item": ["m1", "m2", "m3", "m4"],
            "title": ["Alien (1979)", "Blade Runner (1982)", "Brazil (1985)", 'A "quoted" <|im_start|> title'],
            "category": [["Sci-Fi", "Horror"], ["Sci-Fi", "Film-Noir"], ["Sci-Fi", "Comedy"], ["Drama"]],
        }
    )
)
EVIDENCE = ("People who chose Brazil (1985) also chose Delicatessen (1991).",)


def main(argv: list[str] | None = None) -> int:
    """Prints the filled chat and the schema. Returns the exit code: 0, or 2 for an unknown prompt."""
    parser = argparse.ArgumentParser(prog="python -m prompts", description=__doc__)
    parser.add_argument("name", help=f"one of: {', '.join(prompts.names())}")
    try:
        template = prompts.load(parser.parse_args(argv).name)
    except GenrecError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    chat = PromptWriter(EXAMPLE, template).chat(UserContext(history=(3, 0, 1, 2)), EVIDENCE)
    out = [f"{template.version} (shows the last {template.recent} items and {template.sentences} of evidence)", ""]
    for turn in chat:
        out += [f"--- {turn['role']}", turn["content"], ""]
    out += ["--- schema of the reply", json.dumps(template.schema)]
    sys.stdout.write("\n".join(out) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
