"""SARM: ranking with semantic anchors (arXiv 2602.09401)."""

from genrec.tools.sarm.anchors import Anchor, AnchorStore, anchors_for, stored_anchors
from genrec.tools.sarm.tool import SARM, Carried, SARMConfig
from genrec.tools.sarm.train import SARMTraining

__all__ = ["SARM", "Anchor", "AnchorStore", "Carried", "SARMConfig", "SARMTraining", "anchors_for", "stored_anchors"]
