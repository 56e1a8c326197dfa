"""What is known about a user beside their events, as the encoder reads it: hashed attributes.

OxygenREC's encoder input is [profile ; recent ; retrieved] (2512.22386); what its profile holds is not public. Ours:
the context's attributes ("age", "24"), each hashed into one of BUCKETS embeddings (the hashing trick: no vocabulary to
keep, and a value that training never saw is one untrained vector among few). Their mean stands at the head of the
memory, where every request sees it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from genrec.contracts import MAX_ATTRIBUTES

BUCKETS = 1024

Attributes = Sequence[tuple[str, str]]


def bucket(name: str, value: str) -> int:
    """Where an attribute is looked up, whatever its case and outer blanks."""
    return zlib.crc32(f"{name.strip()}={value.strip()}".casefold().encode()) % BUCKETS


def profiles(attributes: Sequence[Attributes]) -> Tensor | None:
    """The buckets of B users, int64 [B, most attributes], -1 where padded; None where nobody has any."""
    found = [[bucket(*pair) for pair in pairs[:MAX_ATTRIBUTES]] for pairs in attributes]
    width = max(map(len, found), default=0)
    return torch.tensor([row + [-1] * (width - len(row)) for row in found]) if width else None
