"""What the thinker's two trainers share: a run that was killed after its last step takes none too many."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genrec.errors import GenrecError
from training.lora import add_flags, begun, go_on


class Trainer:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.state = State()

    def train(self, resume_from_checkpoint: str | None) -> None:
        self.calls.append(("train", resume_from_checkpoint))

    def _load_from_checkpoint(self, path: str) -> None:
        self.calls.append(("load", path))


class State(SimpleNamespace):
    @staticmethod
    def load_from_json(path: str) -> State:
        return State(**json.loads(Path(path).read_text()))


def test_a_checkpoint_of_the_last_step_is_only_read(tmp_path: Path) -> None:
    last = tmp_path / "checkpoint-6"
    last.mkdir()
    (last / "trainer_state.json").write_text('{"log_history": [1, 2]}')
    for checkpoint, steps, calls in (
        (last, 6, [("load", str(last))]),
        (last, 8, [("train", str(last))]),
        (None, 8, [("train", None)]),
    ):
        trainer = Trainer()
        go_on(trainer, checkpoint, steps)
        assert trainer.calls == calls
        assert (trainer.state == State(log_history=[1, 2])) == (calls[0][0] == "load")


def test_folders_of_other_settings_are_refused_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    said: list[str] = []
    out, identity = tmp_path / "out", {"seed": 0}
    work = begun(out, identity, said.append)
    assert work == tmp_path / "out.work"
    work.mkdir()
    (work / "config.json").write_text('{"seed": 1}')
    with pytest.raises(GenrecError, match="holds a started run with other settings"):
        begun(out, identity, said.append)
    out.mkdir()
    (out / "weights").write_text("")
    with pytest.raises(GenrecError, match="exists and was made with other settings"):
        begun(out, identity, said.append)


def test_every_field_is_a_flag() -> None:
    @dataclass
    class Config:
        out: Path = field(metadata={"help": "where"})
        rate: float = field(default=0.5, metadata={"help": "how fast"})
        floor: bool = field(default=True, metadata={"help": "a floor"})
        kind: str = field(default="a", metadata={"help": "which", "choices": ("a", "b")})

    parser = argparse.ArgumentParser()
    add_flags(parser, Config)
    assert vars(parser.parse_args(["--out", "x", "--no-floor", "--kind", "b"])) == {
        "out": Path("x"), "rate": 0.5, "floor": False, "kind": "b",
    }  # fmt: skip
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", "x", "--kind", "c"])
