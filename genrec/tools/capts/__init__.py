"""Channel-aware, preference-aligned trigger selection (arXiv 2602.12564)."""

from genrec.tools.capts.config import CAPTSConfig
from genrec.tools.capts.tool import CAPTS

__all__ = ["CAPTS", "CAPTSConfig"]
