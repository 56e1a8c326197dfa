"""A bundle is whole or refused, with one line that says what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genrec.bundle import Bundle
from genrec.errors import GenrecError


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def test_every_file_is_of_a_safe_kind(tiny_bundle: Path) -> None:
    kinds = {p.suffix for p in tiny_bundle.rglob("*") if p.is_file()}
    assert kinds <= {".json", ".safetensors", ".parquet", ".md", ".png", ".sqlite", ".sqlite-wal", ".sqlite-shm"}


def test_a_moved_bundle_still_loads(copy: Path) -> None:
    bundle = Bundle.load(copy)
    assert len(bundle.dataset.catalog) == 60 == len(bundle.semantic_ids.codes)
    assert {"home", "item", "discovery"} <= set(bundle.weights) <= set(bundle.dataset.scenarios)
    assert all(set(of) == {"floors", "fused"} for of in bundle.weights.values())
    assert "search" not in bundle.weights and bundle.fusion("search") == bundle.fusion("home")  # it cannot read text


def test_a_truncated_file_is_named(copy: Path) -> None:
    file = copy / "generator" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(GenrecError, match=r"damaged: generator/model.safetensors"):
        Bundle.load(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "tools" / "markov" / "tool.json").unlink()
    with pytest.raises(GenrecError, match=r"incomplete: tools/markov/tool.json is missing"):
        Bundle.load(copy)


def test_another_format_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(GenrecError, match="format 99"):
        Bundle.load(copy)


def test_a_cut_off_manifest_is_refused(copy: Path) -> None:
    text = (copy / "bundle.json").read_text()
    (copy / "bundle.json").write_text(text[: len(text) // 2])
    with pytest.raises(GenrecError, match="not valid JSON"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: [], "format None"),
        (lambda m: m | {"format": "1"}, "format 1"),
        (lambda m: m | {"files": []}, "damaged: 'files' is not of type dict"),
        (lambda m: {k: v for k, v in m.items() if k != "files"}, "damaged: 'files' is missing"),
        (lambda m: m | {"files": dict.fromkeys(m["files"], 3)}, "damaged: it holds no JSON object"),
        (lambda m: m | {"files": {"x": {"bytes": 3}}}, "damaged: 'sha256' is missing"),
        (lambda m: m | {"files": {"x": {"bytes": True, "sha256": ""}}}, "not of type int"),
        (lambda m: m | {"config": None}, "damaged: 'config' is not of type dict"),
        (lambda m: m | {"config": {}}, "damaged: 'data' is missing"),
        (lambda m: m | {"config": m["config"] | {"tools": "ease"}}, "damaged: 'tools' is not of type list"),
        (lambda m: m | {"config": m["config"] | {"tools": ["magic"]}}, "unknown tool 'magic'"),
        (lambda m: m | {"config": m["config"] | {"tools": [["ease"]]}}, "unknown tool"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(change: Callable[[Any], Any], says: str, copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(change(manifest)))
    with pytest.raises(GenrecError, match=re.escape(says)) as error:
        Bundle.load(copy)
    assert "bundle.json" in str(error.value) or str(copy) in str(error.value)


def test_what_is_no_bundle_is_said(tmp_path: Path) -> None:
    with pytest.raises(GenrecError, match="no such folder"):
        Bundle.load(tmp_path / "nothing")
    with pytest.raises(GenrecError, match=r"bundle\.json is missing"):
        Bundle.load(tmp_path)


def test_the_store_may_change_after_the_fit(copy: Path) -> None:
    from genrec.contracts import Instruction

    Bundle.load(copy).store.put_many([("u1", "home", Instruction("a", ("b",), "c"))])
    assert Bundle.load(copy).store.get("u1", "home").look_for == "c"  # type: ignore[union-attr]
