"""Fine-tuning the thinker: what it may learn from, one real TRL run, killed and resumed, and the merged adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests_support import shop, tiny_llama

import prompts
from genrec.data import Dataset, Split, leave_one_out, load_dataset, rolling
from genrec.data.dataset import Sequences
from genrec.errors import GenrecError
from genrec.instructions import parse
from serving.llm.base import repetition_penalty
from serving.models import ABOUT, find_model, merged_model, prompt_of
from training import instructions
from training.lora import last_checkpoint
from training.thinker import ThinkerConfig, examples, main, make_trainer, positions, train


@pytest.fixture(scope="module")
def long_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shop with forty events a user: long enough for an earlier slice, windows, validation and test."""
    folder = shop(tmp_path_factory.mktemp("long-shop"))
    rng = np.random.default_rng(3)
    items = [line.split(",")[0] for line in (folder / "items.csv").read_text(encoding="utf-8").splitlines()[1:]]
    lines = ["user,item,timestamp"]
    for user in range(12):
        chosen = rng.permutation(items)[: 36 + user]
        lines += [f"u{user},{item},{1_600_000_000 + 40_000 * step}" for step, item in enumerate(chosen)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def config(out: Path, data: Path | str = "", **changes: Any) -> ThinkerConfig:
    settings: dict[str, Any] = {
        "data": str(data), "out": out, "steps": 4, "batch": 2, "held_out": 2, "later": 12, "dtype": "float32",
        "checkpoint_steps": 2,
    }  # fmt: skip
    return ThinkerConfig(**(settings | changes))


# -- what it may learn from ---------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [leave_one_out, rolling])
def test_targets_lie_in_training_before_each_users_later_events(long_shop: Path, protocol: Any) -> None:
    split = protocol(load_dataset(long_shop))
    asked = config(Path("x"), steps=500)
    found, measured = positions(split, asked)
    assert len(found) > 50 and len(set(found)) == len(found)
    for u, n in found + measured:
        assert n >= 5 and n + asked.horizon <= int(split.train.lengths[u]) - asked.later


@pytest.mark.parametrize("protocol", [leave_one_out, rolling])
def test_no_example_depends_on_validation_test_or_later_training_events(
    long_shop: Path, protocol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every user's later, validation and test events become other items: all the text stays the same; one event
    earlier, and it does not. What the tools propose is left out: it rests on what *other* users did later."""
    monkeypatch.setattr(instructions, "evidence_at", lambda _data, _split, asked, _seed: [()] * len(asked))
    dataset = load_dataset(long_shop)
    asked = config(Path("x"), steps=500)

    def texts(changed_from_end: int) -> list[Any]:
        split: Split = protocol(dataset)
        held_out = dataset.sequences.lengths - split.train.lengths
        changed = changed_last(dataset, held_out + changed_from_end)
        split = protocol(changed)
        points, measured = positions(split, asked)
        return examples(changed, split, points + measured, asked)

    assert texts(asked.later) == texts(0)
    assert texts(asked.later + 1) != texts(0)


def changed_last(dataset: Dataset, counts: np.ndarray) -> Dataset:
    """The same data set in which each user's last `counts` events are other items."""
    s = dataset.sequences
    from_end = s.offsets[1:][s.user_of] - np.arange(s.events)
    items = np.where(from_end <= counts[s.user_of], (s.items + 17) % len(dataset.catalog), s.items).astype(
        s.items.dtype
    )
    return replace(dataset, sequences=Sequences(s.users, s.offsets, items, s.times, s.weights, s.ratings))


def test_the_slice_ends_before_the_first_instruction_that_the_generator_follows(long_shop: Path) -> None:
    """The default keeps exactly the windows of training.instructions away from the thinker."""
    assert ThinkerConfig("x", Path("x")).later == 30
    dataset = load_dataset(long_shop)
    split = leave_one_out(dataset)
    asked = config(Path("x"), steps=500)
    followed = instructions.points(split, window=4, windows=3)  # 3 x 4 = later
    first = {u: min(n for v, n in followed if v == u) for u, _ in followed}
    learnt, _ = positions(split, asked)
    assert learnt and all(n + asked.horizon <= first[u] for u, n in learnt)


def test_users_take_turns_and_those_measured_on_are_not_trained_on(long_shop: Path) -> None:
    split = leave_one_out(load_dataset(long_shop))
    found, measured = positions(split, config(Path("x"), steps=5))
    assert len(found) == 10 and {u for u, _ in found}.isdisjoint({u for u, _ in measured})
    assert len({u for u, _ in found}) == 10  # of twelve users, two measured on: each once
    assert positions(split, config(Path("x"), steps=5)) == (found, measured)
    assert positions(split, config(Path("x"), steps=5, seed=1)) != (found, measured)


def test_replies_follow_the_schema_and_name_what_the_prompt_shows(long_shop: Path) -> None:
    dataset = load_dataset(long_shop)
    split, asked = leave_one_out(dataset), config(Path("x"), steps=500)
    template = prompts.load(asked.prompt)
    for example in examples(dataset, split, positions(split, asked)[0], asked):
        text = example["completion"][0]["content"]
        reply = parse(text, template.schema)
        assert reply is not None and json.loads(text)["look_for"] == reply.look_for  # nothing is tidied away
        assert [turn["role"] for turn in example["prompt"]] == [role for role, _ in template.turns]


def test_too_little_data_is_one_clear_line(shop_folder: Path) -> None:
    split = leave_one_out(load_dataset(shop_folder))  # at most eight events a user
    with pytest.raises(GenrecError, match=r"fine-tuning needs more than held_out \(2\): lower --later or --held-out"):
        positions(split, config(Path("x")))


def test_items_without_labels_are_one_clear_line(long_shop: Path) -> None:
    dataset = load_dataset(str(long_shop / "interactions.csv"))
    split, asked = leave_one_out(dataset), config(Path("x"))
    with pytest.raises(GenrecError, match="no categories to describe items by"):
        examples(dataset, split, positions(split, asked)[0], asked)


# -- a real run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", layers=2, positions=2048)


@pytest.fixture(scope="module")
def adapter(tiny: Path, long_shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines: list[str] = []
    asked = config(tmp_path_factory.mktemp("adapters") / "one", long_shop, model=str(tiny), learning_rate=0.05)
    folder = train(asked, lines.append)
    assert any("held out" in line for line in lines)
    return folder


def test_the_adapter_is_weights_and_provenance_and_nothing_else(adapter: Path, tiny: Path, long_shop: Path) -> None:
    assert sorted(p.name for p in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", ABOUT]
    assert not adapter.with_name("one.work").exists()
    about = json.loads((adapter / ABOUT).read_text())
    assert about["settings"]["later"] == 12 and about["settings"]["prompt_version"].startswith("intent_tuned_v2+")
    assert about["held_out_loss"]["after"] < about["held_out_loss"]["before"]
    assert about["examples"] == 8 and len(about["base"]["sha256"]) == 64 and about["commit"] and about["machine"]
    assert prompt_of(str(adapter)) == "intent_tuned_v2" and prompt_of(str(tiny)) is None and prompt_of(None) is None
    assert train(config(adapter, long_shop, model=str(tiny), learning_rate=0.05), lambda line: None) == adapter
    with pytest.raises(GenrecError, match="made with other settings"):
        train(config(adapter, long_shop, model=str(tiny)), lambda line: None)


def test_the_prompt_in_training_is_the_prompt_at_use_and_only_replies_are_trained_on(
    tiny: Path, long_shop: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    dataset = load_dataset(long_shop)
    split, asked = leave_one_out(dataset), config(tmp_path / "a", long_shop)
    taught = examples(dataset, split, positions(split, asked)[0], asked)
    trainer: Any = make_trainer(str(tiny), taught, [], asked, tmp_path / "work", lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for example, row in zip(taught, trainer.train_dataset, strict=True):
        used = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=True)
        prompt, ids = used["input_ids"], row["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert row["labels"] == [-100] * len(prompt) + ids[len(prompt) :]
        assert tokenizer.decode(ids[len(prompt) :]).startswith(example["completion"][0]["content"])


def test_a_killed_run_goes_on_and_makes_the_same_adapter(
    adapter: Path, tiny: Path, long_shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    class Killed(BaseException):
        pass

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise Killed

    asked = config(tmp_path / "two", long_shop, model=str(tiny), learning_rate=0.05)
    import training.thinker

    def doomed(*arguments: Any) -> Any:
        trainer = make_trainer(*arguments)
        trainer.add_callback(Kill())
        return trainer

    monkeypatch.setattr(training.thinker, "make_trainer", doomed)
    with pytest.raises(Killed):
        train(asked, lambda line: None)
    monkeypatch.undo()
    work = tmp_path / "two.work"
    newest = last_checkpoint(work)
    assert newest is not None and newest.name == "checkpoint-2" and not asked.out.exists()
    shutil.copytree(newest, newest.with_name("checkpoint-3"))
    (newest.with_name("checkpoint-3") / "trainer_state.json").write_text('{"global_')  # cut off by the kill
    assert last_checkpoint(work) == newest
    with pytest.raises(GenrecError, match="holds a started run with other settings"):
        train(replace(asked, seed=1), lambda line: None)
    lines: list[str] = []
    train(asked, lines.append)
    assert "thinker: goes on at checkpoint-2" in lines
    name = "adapter_model.safetensors"
    assert (asked.out / name).read_bytes() == (adapter / name).read_bytes()
    assert json.loads((asked.out / ABOUT).read_text())["resumed"]


def test_a_run_that_was_killed_after_its_last_step_takes_none_too_many(
    tiny: Path, long_shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped early at a checkpoint, and killed before the adapter was kept: the same adapter as without the kill."""
    import training.thinker

    whole = train(config(tmp_path / "whole", long_shop, model=str(tiny), stop=2), lambda line: None)
    asked = config(tmp_path / "cut", long_shop, model=str(tiny), stop=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.thinker, "keep_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(asked, lambda line: None)
    train(asked, lambda line: None)
    name = "adapter_model.safetensors"
    assert (asked.out / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((asked.out / ABOUT).read_text())["settings"]["stop"] == 2


def test_bad_settings_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (
        ["--steps", "0"],
        ["--later", "-1"],
        ["--learning-rate", "0"],
        ["--prompt", "none"],
        ["--model", "x"],
    ):
        assert main(["--data", "nowhere", "--out", str(tmp_path / "a"), *wrong]) == 2
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0 and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


# -- the merged adapter -------------------------------------------------------------------------------


def test_the_merged_model_answers_as_peft_does(adapter: Path, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("GENREC_CACHE", str(tmp_path))
    folder, name = find_model(str(adapter))
    assert name == "tiny+one" and find_model(str(adapter)) == (folder, name) and Path(folder).parents[1] == tmp_path
    assert prompt_of(folder) == prompt_of(str(adapter))
    assert repetition_penalty(str(adapter)) == 1 < repetition_penalty(str(tiny)) == repetition_penalty(None)
    ids = torch.arange(3, 90)[None]
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(tiny)
        plain = base(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, str(adapter))(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - plain).abs().max() > 0.01


def test_what_is_no_plain_lora_for_its_base_is_refused(
    adapter: Path, tiny: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path / "cache"))

    def changed(name: str, **settings: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    with pytest.raises(GenrecError, match=r"no plain LoRA \(use_dora\)"):
        merged_model(changed("dora", use_dora=True))
    other = tiny_llama(tmp_path / "other", layers=1)
    with pytest.raises(GenrecError, match="made for another model"):
        merged_model(changed("elsewhere", base_model_name_or_path=str(other)))
    cut = changed("cut")
    (cut / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(GenrecError, match="is damaged"):
        merged_model(cut)
    (cut / "adapter_model.safetensors").unlink()
    with pytest.raises(GenrecError, match="is missing"):
        merged_model(cut)
    assert [p.name for p in (tmp_path / "cache" / "models").glob("*")] == []
