"""The members of a tar that may be damaged: every header is checked, and after a bad one the next good one is found."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BLOCK = 512
_EMPTY = bytes(_BLOCK)
_WINDOW = 1 << 20  # bytes that a search for the next header reads at once
_FILES = b"0\x007"  # types of an ordinary file
_KEY = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")  # as webdataset: the key ends at the first dot of the file's name


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, and where its header and its `size` bytes of data start."""

    name: str
    header: int
    data: int
    size: int


@dataclass(frozen=True)
class Damage:
    """Something wrong with the tar itself at byte `offset`; `name` is the member's, empty where it is not known."""

    kind: str  # bad header or truncated
    offset: int
    name: str
    detail: str


@dataclass
class Group:
    """The members of one sample, by their suffix in lower case."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def start(self) -> int:
        return min(member.header for member in self.members.values())


def _number(digits: bytes) -> int:
    """A number of a header, octal or, for large ones, in base 256; raises ValueError."""
    if digits[0] & 0x80:
        return int.from_bytes(digits, "big") & ((1 << (8 * len(digits) - 1)) - 1)
    text = digits.strip(b" \0")
    return int(text, 8) if text else 0


def _parse(block: bytes) -> tuple[str, int, bytes] | None:
    """Name, size and type of a header, None where it is none."""
    try:
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape"), size, block[156:157]


def _next_header(descriptor: int, start: int, end: int) -> int | None:
    """Where the first valid header after `start` begins, at any byte: a tar that lost some is no longer aligned."""
    while start < end:
        window = os.pread(descriptor, _WINDOW + _BLOCK, start)
        found = window.find(b"ustar", 257)
        while found >= 0 and found - 257 < _WINDOW:
            block = window[found - 257 : found - 257 + _BLOCK]
            if len(block) == _BLOCK and _parse(block):
                return start + found - 257
            found = window.find(b"ustar", found + 1)
        start += _WINDOW
    return None


def _guess(block: bytes) -> str:
    """The name in a header whose checksum is wrong, where it looks like one."""
    name = block[:100].split(b"\0")[0]
    return name.decode() if re.fullmatch(rb"[\w./-]+\.\w+", name) else ""


def _long_name(data: bytes, kind: bytes) -> str | None:
    """The name that a GNU or PAX record gives to the member after it, None where it gives none."""
    if kind == b"L":
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", data)
    return found[1].decode("utf-8", "surrogateescape") if found else None


def scan(descriptor: int) -> Iterator[Member | Damage]:
    """The files of the open tar in order, and between them what is wrong with it; raises OSError."""
    total = os.fstat(descriptor).st_size
    at, previous, long_name = 0, 0, None
    while at < total:
        block = os.pread(descriptor, _BLOCK, at)
        if len(block) < _BLOCK:
            yield Damage("truncated", at, "", f"the tar ends within a header, after {len(block)} bytes")
            return
        parsed = None if block == _EMPTY else _parse(block)
        if parsed is None:
            # From the member before on: where bytes were lost, its data reach over the next header.
            found = _next_header(descriptor, at + 1 if block == _EMPTY else previous + 1, total)
            if block == _EMPTY and found is None:
                return
            what = "zeros" if block == _EMPTY else "no valid header"
            until = "nothing valid follows" if found is None else f"the next header is at byte {found}"
            yield Damage("bad header", at, _guess(block), f"{what} where a header should be; {until}")
            if found is None:
                return
            at, long_name = found, None
            continue
        name, size, kind = parsed
        data, previous = at + _BLOCK, at
        if data + size > total:
            detail = f"the tar ends after {total - data} of {size} bytes"
            yield Damage("truncated", at, long_name or name, detail)
            return
        if kind in (b"L", b"x"):
            long_name = _long_name(os.pread(descriptor, size, data), kind) or long_name
        elif kind in (b"g", b"K"):
            pass
        else:
            if kind in _FILES:
                yield Member(long_name or name, at, data, size)
            long_name = None
        at = data + -(-size // _BLOCK) * _BLOCK
    yield Damage("truncated", total, "", "the tar has no end: what followed is lost")


def key_of(name: str) -> tuple[str, str] | None:
    """(key, suffix in lower case) of a member, None for one that belongs to no sample."""
    found = _KEY.fullmatch(name)
    return (found[1], found[2].lower()) if found and not re.match(r"__[^/]*__($|/)", name) else None


def groups(descriptor: int) -> Iterator[Group | Damage]:
    """The samples of the open tar in order, as webdataset groups them, and what is wrong with the tar."""
    current: Group | None = None
    for item in scan(descriptor):
        if isinstance(item, Damage):
            yield item
            continue
        split = key_of(item.name)
        if split is None:
            continue
        key, suffix = split
        # A suffix that comes again starts another sample of the same key.
        if current is None or key != current.key or suffix in current.members:
            if current is not None:
                yield current
            current = Group(key)
        current.members[suffix] = item
    if current is not None:
        yield current
