"""Tools: what both thinkers consult. The floors are baselines in every table and the first tools to be fused; the other
TOOLS are learned, and fitted where they are asked for."""

from genrec.tools.base import Tool
from genrec.tools.capts import CAPTS, CAPTSConfig
from genrec.tools.content import Content, ContentConfig
from genrec.tools.ease import EASE, EASEConfig
from genrec.tools.ebr import EBR, Controls, EBRConfig
from genrec.tools.itemknn import ItemKNN, ItemKNNConfig
from genrec.tools.markov import Markov, MarkovConfig
from genrec.tools.popularity import Popularity, PopularityConfig

FLOORS: dict[str, type[Tool]] = {t.name: t for t in (Popularity, ItemKNN, EASE, Markov, Content)}
TOOLS: dict[str, type[Tool]] = FLOORS | {t.name: t for t in (EBR, CAPTS)}

__all__ = [
    "CAPTS",
    "EASE",
    "EBR",
    "FLOORS",
    "TOOLS",
    "CAPTSConfig",
    "Content",
    "ContentConfig",
    "Controls",
    "EASEConfig",
    "EBRConfig",
    "ItemKNN",
    "ItemKNNConfig",
    "Markov",
    "MarkovConfig",
    "Popularity",
    "PopularityConfig",
    "Tool",
]
