"""Plain values as bytes, and bytes over pipes: how a judge talks with a process it does not trust.

Both sides use this file; the untrusted one is an interpreter without our packages, so it needs the
standard library alone, and little of that, for it is loaded anew for every completion. What
arrives is data and nothing but data: numbers, texts and containers, to a depth and size.
"""

from __future__ import annotations

import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # these two modules would take longer to load than all else here
    from collections.abc import Callable
    from typing import Any

_DEEPEST = 60
_LONGEST_POLL_S = 1e6
_CONTAINERS: dict[bytes, Callable[[list[Any]], Any]] = {
    b"l": list,
    b"t": tuple,
    b"S": set,
    b"Z": frozenset,
    b"d": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}
_SINGLES = {b"N": None, b"T": True, b"F": False}


class Gone(Exception):
    """The process at the other end ended, or wrote what is no message."""


def pack(value: Any, depth: int = 0) -> bytes:
    """`value` as bytes: None, truth values, numbers, strings, bytes and containers of such; of
    classes derived from these, what they derive from. Raises `TypeError` for anything else."""
    if depth > _DEEPEST:
        raise TypeError(f"nested deeper than {_DEEPEST}")
    if value is None:
        return b"N"
    if value is True or value is False:
        return b"T" if value else b"F"
    if isinstance(value, int):
        number = int(value)
        return _tag(b"i", number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True))
    if isinstance(value, float):
        return _tag(b"f", float(value).hex().encode())
    if isinstance(value, complex):
        return _tag(b"c", f"{value.real.hex()} {value.imag.hex()}".encode())
    if isinstance(value, str):
        return _tag(b"s", str(value).encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes | bytearray):
        return _tag(b"b", bytes(value))
    if isinstance(value, dict):
        items = [part for pair in value.items() for part in pair]
        return _tag(b"d", *(pack(item, depth + 1) for item in items))
    for kind, tag in ((list, b"l"), (tuple, b"t"), (set, b"S"), (frozenset, b"Z")):
        if isinstance(value, kind):
            return _tag(tag, *(pack(item, depth + 1) for item in value))
    raise TypeError(f"a {type(value).__name__} is no plain value")


def unpack(data: bytes) -> Any:
    """The value of these bytes; raises `ValueError` when they are none."""
    try:
        value, end = _read(data, 0, len(data), 0)
    except (IndexError, TypeError, UnicodeError, OverflowError) as error:
        raise ValueError(f"no plain value: {error}") from None
    if end != len(data):
        raise ValueError("no plain value: more bytes than it takes")
    return value


def _tag(tag: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return tag + len(body).to_bytes(4, "little") + body


def _read(data: bytes, at: int, end: int, depth: int) -> tuple[Any, int]:
    tag = data[at : at + 1]
    if tag in _SINGLES:
        return _SINGLES[tag], at + 1
    start = at + 5
    stop = start + int.from_bytes(data[at + 1 : start], "little")
    if depth > _DEEPEST or start > end or stop > end:
        raise ValueError("no plain value: it does not fit")
    body = data[start:stop]
    if tag == b"i":
        return int.from_bytes(body, "little", signed=True), stop
    if tag == b"f":
        return float.fromhex(body.decode()), stop
    if tag == b"c":
        real, imaginary = body.decode().split(" ")
        return complex(float.fromhex(real), float.fromhex(imaginary)), stop
    if tag == b"s":
        return body.decode("utf-8", "surrogatepass"), stop
    if tag == b"b":
        return body, stop
    if tag not in _CONTAINERS:
        raise ValueError(f"no plain value: tag {tag!r}")
    items = []
    while start < stop:
        item, start = _read(data, start, stop, depth + 1)
        items.append(item)
    return _CONTAINERS[tag](items), stop


class Channel:
    """Messages over a pair of pipes, each wait until a given `time.monotonic`."""

    def __init__(self, incoming: int, outgoing: int, largest: int = 1 << 26) -> None:
        self._incoming, self._outgoing, self._largest = incoming, outgoing, largest
        self._taken = bytearray()
        os.set_blocking(incoming, False)
        os.set_blocking(outgoing, False)

    def send(self, value: Any, until: float) -> None:
        """Raises `Gone` when nobody reads any more, `TimeoutError` when they do not in time."""
        body = pack(value)
        data = memoryview(len(body).to_bytes(4, "little") + body)
        while data:
            _wait(self._outgoing, select.POLLOUT, until)
            try:
                data = data[os.write(self._outgoing, data) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Gone("the pipe is closed") from error

    def receive(self, until: float) -> Any:
        """The next message; raises like `send`. After `TimeoutError` it may be called again."""
        self._fill(4, until)
        size = int.from_bytes(self._taken[:4], "little")
        if size > self._largest:
            raise Gone(f"a message of {size} bytes, {self._largest} allowed")
        self._fill(4 + size, until)
        body, self._taken = bytes(self._taken[4 : 4 + size]), self._taken[4 + size :]
        try:
            return unpack(body)
        except ValueError as error:
            raise Gone(str(error)) from None

    def check(self, value: Any) -> None:
        """Raises `TypeError` when `value` cannot be sent."""
        pack(value)

    def widen(self) -> None:
        """Accept messages of any length that memory holds."""
        self._largest = 1 << 26

    def close(self) -> None:
        """Close both pipes."""
        os.close(self._incoming)
        os.close(self._outgoing)

    def _fill(self, size: int, until: float) -> None:
        while len(self._taken) < size:
            _wait(self._incoming, select.POLLIN, until)
            try:
                more = os.read(self._incoming, 1 << 16)
            except BlockingIOError:
                continue
            if not more:
                raise Gone("the process ended")
            self._taken += more


def _wait(pipe: int, event: int, until: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(min(max(until - time.monotonic(), 0.0), _LONGEST_POLL_S) * 1000):
        raise TimeoutError("no answer in time")
