"""Where the nodes of a tree stand: in the order (level, root, child, ...), for a million of them.

A node's place is (below, child): what it stands below, which it shares with its siblings, and its number among them.
Rules: places compare as what they stand for does, level first, in one comparison of bytes; a number takes one byte as
long as it is small, so a deep place costs some bytes, and there is nothing in it to be looked through.
"""

from __future__ import annotations

Place = tuple[bytes, int]

ROOTS: Place = (b"\0", 0)
"""The place before the first root."""

_ONE_BYTE = 247
"""Numbers up to this are a byte; of a greater one the first byte says how many there are."""


def place_below(place: Place) -> Place:
    """Return the place before the first child of a node."""
    below, child = place
    return _coded(level_of(below) + 1) + below[_length(below) :] + _coded(child), 0


def level_of(below: bytes) -> int:
    """Return the level of what stands there: 0 for a root."""
    return below[0] if below[0] <= _ONE_BYTE else int.from_bytes(below[1 : _length(below)])


def _length(code: bytes) -> int:
    """Return how many bytes the first number takes."""
    return max(1, code[0] - _ONE_BYTE + 1)


def _coded(number: int) -> bytes:
    if number <= _ONE_BYTE:
        return bytes((number,))
    length = (number.bit_length() + 7) // 8
    return bytes((_ONE_BYTE + length,)) + number.to_bytes(length)
