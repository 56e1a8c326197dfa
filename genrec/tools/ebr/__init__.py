"""Divide-and-conquer embedding-based retrieval (arXiv 2302.02657)."""

from genrec.tools.ebr.config import Controls, EBRConfig
from genrec.tools.ebr.tool import EBR

__all__ = ["EBR", "Controls", "EBRConfig"]
