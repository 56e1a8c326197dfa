"""MARM: ranking over long histories with cached states (arXiv 2411.09425)."""

from genrec.tools.marm.tool import MARM, MARMConfig, Reason

__all__ = ["MARM", "MARMConfig", "Reason"]
