"""Judged answers as token ids, with the exact tokens that are scored.

`encoding` goes from a judgement to tokens, `reading` from a file to them, and `display` shows them
token by token.
"""

from raylign.data.comparisons.encoding import Answer, Compared
from raylign.data.comparisons.reading import (
    Comparisons,
    Wanted,
    read_comparisons,
    require_enough,
    write_rejections,
)

__all__ = [
    "Answer",
    "Compared",
    "Comparisons",
    "Wanted",
    "read_comparisons",
    "require_enough",
    "write_rejections",
]
