"""Where models compute: a GPU where there is one."""

from __future__ import annotations


def fastest_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
