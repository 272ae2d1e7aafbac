"""Shards that only webdataset opens: their URLs and commands, their samples one after another, and their counts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse

import numpy as np

from .images import DataError
from .shard_examine import SUFFIXES
from .shard_tar import key_of
from .shards import FORMAT, MANIFEST, find_shards
from .stream_order import StreamOrder, check_division, choose_streams

SILENCE = 120.0  # seconds in which a command may write nothing
PAUSES = (0.1, 0.4, 1.5)  # seconds before what broke off is opened again
_PLACE_BITS = 24  # of a sample's id; the shard has the other 20 of 44
_TAR = re.compile(r"([^/\s'\"]*\.tar)[^\s'\"|;)]*")
_REPAIR = "`elsewhere shards repair FOLDER` where the tars are"


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL or a command, which only streaming can read, rather than a place in the file system."""
    path = os.fspath(path)
    return "://" in path or path.startswith("pipe:")


def _reason(error: Exception, url: str) -> str:
    """An error of webdataset or tarfile as one line; webdataset adds the object it read from behind an @."""
    text = getattr(error, "strerror", None) or str(error).split(" @ ")[0]
    missing = getattr(error, "filename", None) or url
    return " ".join((text if missing == url else f"{missing}: {text}").split()) or type(error).__name__


class _Written:
    """What a command writes, as a file; raises OSError where nothing comes for two minutes, for curl waits for ever.

    webdataset's own `read` raises as soon as the command has failed, and so loses by chance what that had written.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.ended = False
        self._arrived = select.poll()
        self._arrived.register(descriptor, select.POLLIN)

    def read(self, size: int = -1) -> bytes:
        chunks = []
        while size:
            if not self._arrived.poll(SILENCE * 1000):
                raise OSError(f"nothing came for {SILENCE:g} s")
            chunks.append(os.read(self._descriptor, size if size > 0 else 1 << 20))
            if not chunks[-1]:
                self.ended = True
                break
            size -= len(chunks[-1])  # below 0 it stays there
        return b"".join(chunks)


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Any]:
    """The bytes at `url` as a file; raises OSError where they, or the command that gives them, end with an error."""
    from webdataset.gopen import gopen

    try:
        stream: Any = gopen(url)
    except Exception as error:
        raise OSError(_reason(error, url)) from None
    command: subprocess.Popen | None = getattr(stream, "proc", None)
    file = _Written(stream.stream.fileno()) if command else stream
    try:
        failure = ""
        try:
            yield file
            while command and file.read(1 << 20):  # what follows a tar's end: commands wait until it is taken
                pass
        except MemoryError:
            raise
        except Exception as error:
            failure = _reason(error, url)
        if command and file.ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if (status := command.wait(10)) not in stream.ignore_status:
                    failure = f"{failure or 'it ends early'} (its command ended with status {status})"
        if failure:
            raise OSError(failure)
    finally:
        if command:
            command.kill()  # not terminate: a worker's children inherit its deafness to SIGTERM
        with contextlib.suppress(Exception):
            stream.close()


def groups_of(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members, by suffix, of one sample of the tar at `url` after another; raises OSError where it breaks off.

    Grouped as `shard_tar.groups` does: webdataset's own grouping ends the tar at a name that comes twice.
    """
    from webdataset.tariterators import tar_file_iterator

    key, members = "", {}
    with _opened(url) as stream:
        for file in tar_file_iterator(stream):
            split = key_of(file["fname"])
            if split is None:
                continue
            if members and (split[0] != key or split[1] in members):
                yield key, members
                members = {}
            key = split[0]
            members[split[1]] = file["data"]
        if members:
            yield key, members


@dataclass(frozen=True, slots=True)
class Raw:
    """An image as it stands in a shard; `place` counts the shard's images, as the rows of an index do."""

    shard: int
    place: int
    key: str
    data: bytes
    label: int

    @property
    def id(self) -> int:
        return self.shard << _PLACE_BITS | self.place


def image_of(members: dict[str, bytes]) -> tuple[bytes, int] | None:
    """The image file of a sample and its label, -1 where there is none that is a number; None without an image."""
    suffix = next((suffix for suffix in members if suffix in SUFFIXES), None)
    if suffix is None:
        return None
    try:
        return members[suffix], int(members.get("cls", b"-1"))
    except ValueError:
        return members[suffix], -1


def _manifest(url: str) -> tuple[dict[str, Any] | None, str]:
    """The manifest at `url`, or why there is none; raises DataError for one of another format."""
    text, reason = b"", ""
    # curl, which opens the other URLs, tries again by itself, for a minute where there is no such host.
    for pause in (*PAUSES, None) if url.startswith("pipe:") else (None,):
        try:
            with _opened(url) as stream:
                text = stream.read()
            break
        except OSError as error:
            reason = str(error)
        if pause is not None:
            time.sleep(pause)
    else:
        return None, reason
    try:
        manifest = json.loads(text)
        version, _ = manifest["version"], manifest["classes"]
        assert all(isinstance(s["name"], str) and isinstance(s["samples"], int) for s in manifest["shards"])
    except (ValueError, KeyError, TypeError, AssertionError):
        return None, "it is not what `elsewhere shards write` writes"
    if version != FORMAT:
        raise DataError(f"{url} has format {version}, but this version reads format {FORMAT}: update elsewhere.")
    return manifest, ""


def _expanded(path: str) -> list[str]:
    """The URLs or paths of the shards that one entry of `data.path` names."""
    import webdataset as wds
    from webdataset.gopen import gopen_schemes, rewrite_url

    if not is_remote(path):
        return find_shards(path)
    try:
        urls = wds.shardlists.expand_urls(path)
    except (ValueError, AssertionError) as error:  # asserted: that ${NAME} is set, as WDS_NAME
        raise DataError(f"data.path={path} cannot be expanded ({error}): check its braces.") from None
    scheme = urlparse(rewrite_url(urls[0])).scheme
    if scheme not in (*gopen_schemes, "file"):
        known = ", ".join(sorted(name for name in gopen_schemes if not name.startswith("_")))
        raise DataError(
            f"data.path={path}: webdataset opens no {scheme}: (it knows {known}); give a command that writes the tar, "
            f"as in `pipe:aws s3 cp {path} -`."
        )
    return urls


class Stream:
    """Shards to be read from start to end, and how many samples each gives to an epoch.

    `path` is what `find_shards` takes, or URLs and `pipe:` commands of webdataset's with braces, or a list of these.
    `streams` (None: the largest power of two up to 64 that divides `global_batch` and is no more than the shards)
    must divide `global_batch`. Counts come from the manifest beside the shards; without one `samples` are taken to be
    spread evenly. `shuffle_buffer` images of a shard are shuffled at a time. Images get `channels` channels (None:
    what most have, by the manifest). Raises `DataError` for shards without counts and for numbers that do not fit.
    """

    def __init__(
        self, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], channels: int | None, *,
        streams: int | None, global_batch: int, seed: int, samples: int | None = None, shuffle_buffer: int = 1000,
    ):  # fmt: skip
        paths = [path] if isinstance(path, (str, os.PathLike)) else path
        self.urls = [url for one in paths for url in _expanded(os.fspath(one))]
        if not self.urls:
            raise DataError("data.path is an empty list: name at least one shard.")
        if shuffle_buffer < 1:
            raise DataError(f"data.shuffle_buffer={shuffle_buffer} must be 1 or more; 1 leaves a shard in its order.")
        self.channels = channels
        self.classes: list[str] | None = None
        self.exact = True  # whether the counts are those of the shards themselves
        self.counts = self._count(samples)  # [S] int64
        if len(self.urls) >= 1 << 20 or self.counts.max() >= 1 << _PLACE_BITS:
            raise DataError("A run reads up to 2^20 shards of up to 2^24 samples: write larger, or smaller, ones.")
        if not self.counts.any():
            raise DataError(f"{self.urls[0]} and the other shards hold no images: write them anew.")
        self.global_batch, self.shuffle_buffer = global_batch, shuffle_buffer
        self.streams = choose_streams(streams, len(self.urls), global_batch)
        self.order = StreamOrder(self.counts, self.streams, seed)

    def _count(self, samples: int | None) -> np.ndarray:
        """Samples of each shard; takes classes and channels from the manifests too."""
        places = [self._manifest_of(url) for url in self.urls]
        manifests: dict[str, dict[str, Any]] = {}
        missing = ""
        for place in dict.fromkeys(place for place, _ in places):
            manifest, reason = _manifest(place) if place else (None, "its place cannot be told from theirs")
            if manifest:
                manifests[place] = manifest
            else:
                missing = missing or f"{place or self.urls[0]}: {reason}"
        self._describe(list(manifests.values()))
        if missing and not samples:
            raise DataError(
                f"There is no manifest that counts the images of the shards ({missing}): {_REPAIR} makes one, or set "
                "data.samples=N, the number of all their images."
            )
        if missing:
            self.exact = False
            return np.full(len(self.urls), -(-(samples or 0) // len(self.urls)))
        listed = {(at, s["name"]): s["samples"] for at, manifest in manifests.items() for s in manifest["shards"]}
        for at, name in places:
            if (at, name) not in listed:
                raise DataError(f"{at} does not list {name}: {_REPAIR} makes it anew.")
        counts = np.array([listed[place] for place in places], dtype=np.int64)
        if samples not in (None, counts.sum()):
            raise DataError(
                f"data.samples={samples}, but the manifest beside the shards counts {counts.sum()}: leave data.samples "
                "out."
            )
        return counts

    @staticmethod
    def _manifest_of(url: str) -> tuple[str, str]:
        """Where the manifest of a shard is, and the shard's name in it; empty where the URL does not tell."""
        if not is_remote(url):
            return os.path.join(os.path.dirname(url), MANIFEST), os.path.basename(url)
        found = _TAR.search(url)
        return (_TAR.sub(MANIFEST, url), found[1]) if found else ("", "")

    def _describe(self, manifests: list[dict[str, Any]]) -> None:
        if any(manifest["classes"] != manifests[0]["classes"] for manifest in manifests):
            raise DataError("The shards have different classes: give shards that were written from one set of classes.")
        self.classes = manifests[0]["classes"] if manifests else None
        if self.channels is None:
            sums: Counter[str] = sum((Counter(manifest.get("channels", {})) for manifest in manifests), Counter())
            self.channels = int(max(sums, key=lambda channels: sums[channels])) if sums else None

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def fingerprint(self) -> int:
        """What the order depends on beside seed and shuffle buffer: a crc32 of the counts and the streams."""
        return zlib.crc32(self.counts.astype("<i8").tobytes(), self.streams)

    def workers_for(self, world: int, wanted: int) -> int:
        """The most loader processes up to `wanted` that share a rank's streams evenly; raises `DataError` for ranks."""
        check_division(self.streams, world, 0, self.global_batch)
        return max((n for n in range(1, wanted + 1) if not self.streams // world % n), default=0)
