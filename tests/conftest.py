"""Fixtures of the tiny shop (tests_support.py): its folder, its fit, its bundle."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from tests_support import shop


@pytest.fixture(scope="session")
def shop_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def tiny_config(shop_folder: Path) -> Callable[..., object]:
    """FitConfig of the tiny shop; keyword arguments override."""
    from training.fit import FitConfig

    def make(out: Path, **changes: object) -> FitConfig:
        settings: dict[str, object] = {
            "data": str(shop_folder),
            "out": out,
            "epochs": 3,
            "d_model": 16,
            "layers": 1,
            "levels": 3,
            "codes": 8,
            "embeddings": str(shop_folder / "embeddings.npy"),
        }
        return FitConfig(**(settings | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tiny_config: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle over the tiny shop, made by the real fit. Tests must not write into it: copy it first."""
    from training.fit import fit

    return fit(tiny_config(tmp_path_factory.mktemp("bundles") / "tiny"))  # type: ignore[arg-type]
