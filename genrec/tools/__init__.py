"""Tools: what both thinkers consult. The floors here are baselines in every table and the first tools to be fused."""

from genrec.tools.base import Tool
from genrec.tools.content import Content, ContentConfig
from genrec.tools.ease import EASE, EASEConfig
from genrec.tools.itemknn import ItemKNN, ItemKNNConfig
from genrec.tools.markov import Markov, MarkovConfig
from genrec.tools.popularity import Popularity, PopularityConfig

FLOORS: dict[str, type[Tool]] = {t.name: t for t in (Popularity, ItemKNN, EASE, Markov, Content)}

__all__ = [
    "EASE",
    "FLOORS",
    "Content",
    "ContentConfig",
    "EASEConfig",
    "ItemKNN",
    "ItemKNNConfig",
    "Markov",
    "MarkovConfig",
    "Popularity",
    "PopularityConfig",
    "Tool",
]
