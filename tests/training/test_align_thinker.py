"""Aligning the thinker: what an instruction is worth, the behaviours of TRL that it stands on, and one real run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests_support import TEXT, tiny_llama, tiny_model

import training.instructions
from genrec.alignment import instruction_rewards as rewards
from genrec.bundle import Bundle
from genrec.contracts import Instruction, UserContext
from genrec.errors import GenrecError
from genrec.generator.search import make_history, make_request, score_items
from training import align_thinker
from training.align_thinker import PARTS, AlignThinkerConfig, Examiner, Position, reward_functions, trainer_class
from training.fit import SPLITS

GOOD = Instruction("mostly tea", ("more tea",), "green tea")
LONG = Instruction("mostly tea", ("more tea",), " ".join(["tea"] * 24))


def test_validity_groundedness_and_length() -> None:
    said = [GOOD, None, LONG]
    assert rewards.valid(said).tolist() == [1, 0, 1]
    assert rewards.grounded(said, ["Kinds: tea, green"] * 3).tolist() == [1, 0, 1]
    assert rewards.brief(said).tolist() == [1, 0, 0.5]


def test_help_and_nearness_are_bounded_and_nothing_for_an_invalid_reply() -> None:
    said = [GOOD, GOOD, GOOD, None]
    assert rewards.helps(np.array([1.0, -9.0, np.nan, 9.0]), said).tolist() == [0.5, -1, -1, -1]
    assert rewards.near(np.array([0.4, -0.3, np.nan, 0.9]), said).tolist() == [0.4, 0, 0, 0]


@pytest.mark.parametrize("retrieved", [0, 2])
def test_the_gain_is_a_difference_of_exact_log_probabilities(retrieved: int) -> None:
    model = tiny_model(retrieved=retrieved)
    contexts, targets = [UserContext(history=(1, 2)), UserContext(history=(3,))], np.array([5, 6])
    vectors = np.random.default_rng(0).normal(size=(2, TEXT)).astype(np.float32)
    vectors[1] = np.nan
    gain = rewards.log_probability_gain(model, contexts, targets, vectors)
    history = make_history(contexts, 6)
    told, default = (
        score_items(model, history, make_request(model, contexts, v), torch.tensor([[5], [6]]))[0, 0]
        for v in (vectors, None)
    )
    assert gain[0] == pytest.approx(float(told - default)) and gain[0] != 0
    assert gain[1] == 0  # nothing was said
    near = rewards.target_likeness(model, contexts, targets, vectors)
    assert -1 <= near[0] <= 1 and near[1] == 0
    if not retrieved:
        item = model.item_text[5].numpy()
        assert near[0] == pytest.approx(vectors[0] @ item / np.linalg.norm(item) / np.linalg.norm(vectors[0]), abs=1e-5)


class FakeExaminer:
    """Counts how often it is asked."""

    template = align_thinker.prompts.load("intent_v2")
    calls = 0

    def judge(self, said: Any, asked: Any) -> dict[str, np.ndarray]:
        self.calls += 1
        return {name: np.arange(len(said)) + 0.1 * i for i, name in enumerate(PARTS)}


def test_reward_functions_are_what_trl_calls_and_share_one_judgement() -> None:
    examiner = FakeExaminer()
    asked = [Position(UserContext(), [{"role": "user", "content": "x"}], 0, 0)]
    found = reward_functions(examiner, asked)  # type: ignore[arg-type]
    assert [f.__name__ for f in found] == list(PARTS)
    said = [[{"role": "assistant", "content": "{}"}], "plain text"]
    values = [f(completions=said, position=[0, 0], prompts=None, other=1) for f in found]
    assert values[0] == [0.0, 1.0] and values[2] == [0.2, 1.2] and examiner.calls == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"updates": 1}, "below 2 every ratio is 1"), ({"group": 1}, "group is 1"), ({"learning_rate": 0.0}, "above 0"),
     ({"help_weight": -1.0}, "must be 0 or more"), ({"tokens": 1}, "tokens is 1"),
     ({"updates": 3, "checkpoint_steps": 10}, r"must be a multiple of updates \(3\)")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(GenrecError, match=message):
        AlignThinkerConfig(Path("b"), Path("o"), **changes)


def test_a_bundle_of_own_embeddings_cannot_judge_texts(tiny_bundle: Path, tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path / "llama")
    config = AlignThinkerConfig(tiny_bundle, tmp_path / "out", model=str(llama))
    with pytest.raises(GenrecError, match="reads no instructions"):
        align_thinker.align(config, lambda _: None)
    assert not (tmp_path / "out").exists()


def test_prompts_show_what_tools_that_were_not_fitted_on_the_user_propose(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tools of the fit speak at validation and test requests alone; here every position is a training one."""
    real = Bundle.load(tiny_bundle)
    config = {"embeddings": "", "protocol": "leave-one-out"}
    bundle = SimpleNamespace(folder=tiny_bundle, config=config, dataset=real.dataset, generator=None)
    template = align_thinker.prompts.load("intent_tuned_v2")
    monkeypatch.setattr(training.instructions, "propose", lambda *_: pytest.fail("a tool fitted on all users"))
    points = [(u, 2) for u in range(8)]
    examiner = Examiner(bundle, template)  # type: ignore[arg-type]
    asked = examiner.positions(points)
    split = SPLITS["leave-one-out"](real.dataset)
    said = training.instructions.evidence_at(real.dataset, split, points)
    for position, evidence, (u, n) in zip(asked, said, points, strict=True):
        proposed = [int(row) for row in evidence[0].items]
        assert position.chat == examiner.writer.chat(split.train.context(u, n), evidence)
        assert position.wanted == split.train.items[split.train.offsets[u] + n]
        assert not set(proposed) & set(position.context.history)
        right = examiner.right(position)
        assert right is not None and right.look_for.startswith(position.titles[0])
    assert examiner.positions([]) == []


# -- TRL -------------------------------------------------------------------------------------------------


def test_the_private_methods_of_trl_are_those_that_are_overridden() -> None:
    trainer = pytest.importorskip("trl").GRPOTrainer
    for name, parameters in {
        "_compute_loss": ["self", "model", "inputs"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    }.items():
        assert list(inspect.signature(getattr(trainer, name)).parameters) == parameters
    source = inspect.getsource(trainer._generate_and_score_completions)
    assert "gradient_accumulation_steps % generate_every != 0" in source
    assert "current_gradient_accumulation_steps" in inspect.getsource(trainer._compute_loss)


def run_trl(
    folder: Path, reward: Callable[..., list[float | None]], floors: tuple[float, float] = (np.nan, np.nan)
) -> tuple[Any, list[dict[str, Any]], list[torch.Tensor]]:
    """TRL itself on a tiny language model: four steps on two batches of four completions. Returns the trainer, its
    batches of rollouts and the weights it began with."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset as Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = tiny_llama(folder / "llama")
    config = AlignThinkerConfig(Path("b"), Path("o"), group=4, prompts_per_step=1, updates=2)
    seen: list[dict[str, Any]] = []

    class Watched(trainer_class(config)):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            seen.append(output | {"floor": float(self._floor[0])})
            return output

    chat = [{"role": "user", "content": "tea?"}]
    rows = [{"prompt": chat, "position": i, "floor": floors[i]} for i in range(2)]
    trainer = Watched(
        model=AutoModelForCausalLM.from_pretrained(llama),
        reward_funcs=[reward],
        args=trl.GRPOConfig(
            output_dir=str(folder / "run"), max_steps=4, per_device_train_batch_size=4, num_generations=4,
            num_iterations=2, gradient_accumulation_steps=1, max_completion_length=8, reward_weights=[1.0], beta=0.0,
            learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1,
            save_strategy="no", gradient_checkpointing=False, shuffle_dataset=False,
        ),
        train_dataset=Table.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(llama, padding_side="left"),
    )  # fmt: skip
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    return trainer, seen, before


def length(completions: list[Any], **_: Any) -> list[float | None]:
    return [float(len(c[-1]["content"])) for c in completions]


def test_a_real_run_trains_with_live_ratios_and_a_floor(tmp_path: Path) -> None:
    """Rewards of our functions, our loss, old log-probabilities, the floor."""
    trainer, seen, before = run_trl(tmp_path, length, floors=(np.nan, 1e9))
    said = [line for line in trainer.state.log_history if "ratio_largest" in line]
    assert len(said) == 4 and said[0]["ratio_largest"] == pytest.approx(1.0, abs=1e-3)
    assert max(line["ratio_largest"] for line in said[1::2]) > 1.001  # the second step on the same texts
    assert len(seen) == 2  # two batches of rollouts, each used twice
    for batch in seen:
        assert batch["old_per_token_logps"] is not None
        highest = float(batch["advantages"].max())
        assert highest == 0 if np.isfinite(batch["floor"]) else highest > 0  # above every reward: none stays positive
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_completion_without_a_reward_teaches_nothing(tmp_path: Path) -> None:
    """As TRL has it: advantage 0, and the group's mean and deviation are those of the others."""
    earned = [None, 1.0, 2.0, 6.0]
    _, seen, _ = run_trl(tmp_path, lambda completions, **_: earned)
    deviation = torch.tensor([1.0, 2.0, 6.0]).std() + 1e-4
    for batch in seen:
        expected = torch.tensor([0.0, -2.0, -1.0, 3.0]) / deviation
        torch.testing.assert_close(batch["advantages"], expected, rtol=1e-3, atol=1e-3)


def test_groups_of_equal_or_no_rewards_change_nothing(tmp_path: Path) -> None:
    for earned in (2.0, None):
        trainer, _, before = run_trl(tmp_path / str(earned), lambda completions, earned=earned, **_: [earned] * 4)
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


# -- the whole job ---------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.fixture
def listener(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bundle as one that reads texts, each a vector of its own; and any reply as an instruction, as a tiny
    random model writes no JSON."""
    load, size = Bundle.load, Bundle.load(tiny_bundle).generator.config.text_dim

    def reads_texts(folder: Path) -> Bundle:
        bundle = load(folder)
        bundle.config["embeddings"] = ""
        vars(bundle)["embedder"] = None
        return bundle

    def vector(text: str) -> np.ndarray:
        return np.random.default_rng(list(text.encode())).normal(size=size).astype(np.float32)

    def made(text: str, schema: object) -> Instruction | None:
        return Instruction("s", ("i",), text) if text.strip() else None

    monkeypatch.setattr(align_thinker.Bundle, "load", reads_texts)
    monkeypatch.setattr(align_thinker, "embed_texts", lambda _, texts: np.stack([vector(t) for t in texts]))
    monkeypatch.setattr(align_thinker, "parse", made)
    return tiny_bundle


def settings(bundle: Path, llama: Path, out: Path) -> AlignThinkerConfig:
    return AlignThinkerConfig(
        bundle, out, model=str(llama), steps=6, updates=2, checkpoint_steps=2, prompts_per_step=1, group=3, tokens=8,
        later=0, held_out=4, rank=2, learning_rate=0.05,
    )  # fmt: skip


def test_a_bundle_becomes_an_adapter_and_a_killed_run_the_same_one(
    listener: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, lines = tiny_llama(tmp_path / "llama", layers=2), []
    whole = align_thinker.align(settings(listener, llama, tmp_path / "one"), lines.append)
    told = json.loads((whole / "alignment.json").read_text())
    for when in ("before", "after"):
        figures = told[when]["figures"]
        assert set(figures) == {*PARTS, "reward", "intent hit"}
        assert all(f["low"] <= f["mean"] <= f["high"] for f in figures.values())
        assert len(told[when]["samples"]) == 4 and all(s["shown"] and "said" in s for s in told[when]["samples"])
    assert told["before"]["figures"] != told["after"]["figures"]
    assert [line["step"] for line in told["log"]] == [1, 3, 5]  # a line for each batch of rollouts
    assert any(line.startswith("thinker: 5 of 6 steps, reward") for line in lines)
    about = json.loads((whole / "thinker.json").read_text())
    assert about["figures"]["after"] == told["after"]["figures"] and about["resumed"] is False
    assert not (tmp_path / "one.work").exists()

    go_on = align_thinker.go_on

    def dies(trainer: Any, checkpoint: Path | None, steps: int) -> None:
        class Kill(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 5:
                    raise Killed

        trainer.add_callback(Kill())
        go_on(trainer, checkpoint, steps)

    asked = settings(listener, llama, tmp_path / "two")
    monkeypatch.setattr(align_thinker, "go_on", dies)
    with pytest.raises(Killed):
        align_thinker.align(asked, lines.append)
    assert not asked.out.exists()
    monkeypatch.setattr(align_thinker, "go_on", go_on)
    align_thinker.align(asked, lines.append)
    assert "thinker: goes on at checkpoint-4" in lines
    name = "adapter_model.safetensors"
    assert (asked.out / name).read_bytes() == (whole / name).read_bytes()
    again = json.loads((asked.out / "alignment.json").read_text())
    assert again["before"] == told["before"] and again["after"] == told["after"]
    lines.clear()
    align_thinker.align(asked, lines.append)
    assert lines == [f"{asked.out} is there already, made with the same settings"]
