"""genrec: generative recommendation with a language model that thinks slowly and a generator that answers fast."""

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """`from genrec import Recommender` without paying for torch on `import genrec`."""
    if name == "Recommender":
        from genrec.recommender import Recommender

        return Recommender
    raise AttributeError(f"module 'genrec' has no attribute {name!r}")
