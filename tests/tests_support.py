"""A tiny shop that every test can afford: some sixty items in six categories, users who stay in one or two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

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
