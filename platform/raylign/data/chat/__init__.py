"""Conversations as token ids, with the exact set of tokens that fine-tuning trains.

`faults` says what is no conversation to learn from, `encoding` which tokens are trained, `reading`
goes from a file to examples, and `display` shows them token by token.
"""

from raylign.data.chat.encoding import Conversation, encode_dialogues, find_closing
from raylign.data.chat.faults import find_fault
from raylign.data.chat.reading import (
    Demonstrations,
    Rejection,
    find_source,
    read_demonstrations,
    require_enough,
    write_rejections,
)

__all__ = [
    "Conversation",
    "Demonstrations",
    "Rejection",
    "encode_dialogues",
    "find_closing",
    "find_fault",
    "find_source",
    "read_demonstrations",
    "require_enough",
    "write_rejections",
]
