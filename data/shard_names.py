"""What an image was called before it was written to a shard."""

from __future__ import annotations

import json
import os

from .images import Channels, Source, Subset
from .shards import Shards
from .sources import Joined

_BLOCK, _WINDOW = 512, 1 << 14  # of a tar; bytes behind an image in which its label and its description stand


def original_name(source: Source, i: int) -> str:
    """The path of image `i` where it came from, as `elsewhere shards write` notes it; else the source's own name."""
    while not isinstance(source, Shards):
        if isinstance(source, Subset):
            source, i = source.source, int(source.indices[i])
        elif isinstance(source, Channels):
            source = source.source
        elif isinstance(source, Joined):
            place, i = source._place(i)
            source = source.sources[place]
        else:
            return source.name(i)
    shard, offset = source._place(i)
    behind = offset + -(-int(source.sizes[i]) // _BLOCK) * _BLOCK
    try:
        window = os.pread(source._descriptor(shard).number, _WINDOW, behind)
        key = os.pread(source._descriptor(shard).number, 100, offset - _BLOCK).split(b".")[0]
        place = 0
        while window[place : place + len(key) + 1] == key + b".":
            member, size = window[place : place + 100].split(b"\0")[0], int(window[place + 124 : place + 135], 8)
            if member.endswith(b".json"):
                return str(json.loads(window[place + _BLOCK : place + _BLOCK + size])["path"])
            place += _BLOCK + -(-size // _BLOCK) * _BLOCK
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return source.name(i)
