"""The adapters that come with genrec: small, without data, made for the prompts of today, and loadable."""

import json

import pytest

import prompts
from genrec.contracts import UserContext
from genrec.instructions import PromptWriter, parse
from prompts.__main__ import EXAMPLE
from serving.instruct import MAX_TOKENS
from serving.llm import Transformers
from serving.models import ABOUT, ADAPTERS, PACKAGED, find_model, prompt_of, shipped_adapters


def test_there_is_one() -> None:
    assert "ml-100k-v2" in shipped_adapters()


@pytest.mark.parametrize("name", shipped_adapters())
def test_an_adapter_is_small_and_says_what_it_was_made_from(name: str) -> None:
    folder = ADAPTERS / name
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", ABOUT]
    assert sum(p.stat().st_size for p in folder.iterdir()) < 5_000_000
    about = json.loads((folder / ABOUT).read_text())
    assert about["base"]["name"] == PACKAGED
    assert about["command"].startswith("python -m training.thinker") and f"serving/adapters/{name}" in about["command"]
    assert about["settings"]["later"] >= 30  # three windows of training.instructions: see training/thinker.py
    assert len(about["commit"]) >= 40 and about["held_out_loss"]["after"] < about["held_out_loss"]["before"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == PACKAGED  # no path of the machine that made it


@pytest.mark.parametrize("name", shipped_adapters())
def test_an_adapters_prompt_is_as_it_was_in_training(name: str) -> None:
    """Fails when the prompt is edited: give the edited one a new name, or train the adapter again."""
    about = json.loads((ADAPTERS / name / ABOUT).read_text())
    prompt = prompt_of(name)
    assert prompt is not None and prompts.load(prompt).version == about["settings"]["prompt_version"]


@pytest.mark.real
@pytest.mark.parametrize("name", shipped_adapters())
def test_a_shipped_adapter_writes_what_the_schema_asks_for_without_a_grammar(name: str) -> None:
    folder, called = find_model(name)
    assert called == f"{PACKAGED}+{name}"
    template = prompts.load(prompt_of(name) or "")
    writer = PromptWriter(EXAMPLE, template)
    chats = [writer.chat(UserContext(history=rows)) for rows in ((0, 1, 2), (2, 3))]
    model = Transformers(folder)
    for text in model.generate(chats, None, MAX_TOKENS):
        said = parse(text, template.schema)
        assert said is not None and said.look_for
    model.close()
