"""One shard looked at: every header, checksum, key and label, and the index beside it; what is wrong is named."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from .decode import UnreadableImage, decode
from .shard_tar import Damage, Group, Member, groups, key_of
from .shards import KINDS, IndexProblem, ShardIndex, index_path

INDEXES = {"missing index", "damaged index", "stale index"}
# Warnings are what `repair` mends without losing an image, or what training goes on without.
WARNINGS = INDEXES | {"missing label", "duplicate key", "manifest", "unfinished"}
DAMAGE = {
    "truncated", "bad header", "wrong checksum", "empty image", "undecodable image", "missing image", "missing shard",
    "unreadable shard",
}  # fmt: skip
SUFFIXES = ("jpg", "jpeg", "png", "npy", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "img")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `kind` is of WARNINGS or DAMAGE, `offset` in bytes; key and offset where there are."""

    kind: str
    shard: str  # its name; of several folders, its path from the one that was given
    key: str | None
    offset: int | None
    detail: str

    @property
    def severity(self) -> int:
        """1 for a warning, 2 for damage."""
        assert self.kind in WARNINGS | DAMAGE, self.kind
        return 2 if self.kind in DAMAGE else 1

    def __str__(self) -> str:
        key = f", {self.key}" if self.key else ""
        place = f" at byte {self.offset}" if self.offset is not None else ""
        return f"{self.shard}{key}{place}: {self.kind}: {self.detail}"


@dataclass(frozen=True)
class Found:
    """An image that stands in a tar, with the other members of its sample; `bad` says what is wrong with it."""

    group: Group
    image: Member
    suffix: str
    crc32: int
    label: int
    bad: str | None

    @property
    def kind(self) -> int:
        name = {"jpeg": "jpg"}.get(self.suffix, self.suffix)
        return KINDS.index(name if name in KINDS else "other")


@dataclass
class ShardReport:
    """One shard as it is. `index` is what stands beside it where that describes it, even if the tar is now damaged."""

    path: str
    bytes: int = 0
    crc32: int = 0
    images: list[Found] = field(default_factory=list)
    orphans: list[Group] = field(default_factory=list)  # samples whose image is not found
    damage: list[Damage] = field(default_factory=list)
    index: ShardIndex | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def whole(self) -> bool:
        """Whether nothing in the tar itself is damaged."""
        return all(finding.severity < 2 for finding in self.findings)

    def add(self, kind: str, key: str | None, offset: int | None, detail: str) -> None:
        self.findings.append(Finding(kind, self.name, key, offset, detail))

    def new_index(self) -> ShardIndex:
        """The index that belongs beside this tar."""
        rows = [(f.image.data, f.image.size, f.crc32, f.label, f.kind) for f in self.images]
        return ShardIndex.of(self.bytes, self.crc32, rows)


def _crc32(descriptor: int) -> tuple[int, int]:
    """(bytes, crc32) of an open file."""
    value = at = 0
    while chunk := os.pread(descriptor, _CHUNK, at):
        value = zlib.crc32(chunk, value)
        at += len(chunk)
    return at, value


def _label(descriptor: int, group: Group) -> int:
    """The label of a sample, -1 where there is none that is a number."""
    member = group.members.get("cls")
    try:
        return int(os.pread(descriptor, member.size, member.data)) if member else -1
    except ValueError:
        return -1


def _image(descriptor: int, group: Group, deep: bool) -> Found | None:
    """The image of a sample, None where it has none."""
    suffix = next((s for s in group.members if s in SUFFIXES), None)
    if suffix is None:
        return None
    member = group.members[suffix]
    data = os.pread(descriptor, member.size, member.data)
    bad = None if member.size else "empty image: it has 0 bytes"
    if deep and not bad:
        try:
            decode(data, None)
        except UnreadableImage as error:
            bad = f"undecodable image: {error.reason}"
    return Found(group, member, suffix, zlib.crc32(data), _label(descriptor, group), bad)


def examine(path: str, expected: int | None = None, *, deep: bool = False, labelled: bool = False) -> ShardReport:
    """Look at the tar at `path` and at its index; `expected` is the tar's crc32 where a manifest tells it.

    `deep` decodes every image; `labelled` says that every sample should have a label.
    """
    report = ShardReport(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        report.add("missing shard" if not os.path.exists(path) else "unreadable shard", None, None, f"{error.strerror}")
        return report
    try:
        report.bytes, report.crc32 = _crc32(descriptor)
        for item in groups(descriptor):
            if isinstance(item, Damage):
                report.damage.append(item)
            elif found := _image(descriptor, item, deep):
                report.images.append(found)
            else:
                report.orphans.append(item)
    except OSError as error:
        report.add("unreadable shard", None, None, f"{error.strerror}")
        return report
    finally:
        os.close(descriptor)
    # After a bad header, a search may come upon samples in another order than they stand in the tar.
    report.images.sort(key=lambda found: found.image.data)
    _judge_tar(report)
    _judge_index(report, expected)
    _judge_samples(report, labelled or any(found.label != -1 for found in report.images))
    report.findings.sort(key=lambda finding: (finding.offset is not None, finding.offset or 0))
    return report


def _key_at(report: ShardReport, damage: Damage) -> str | None:
    """The key of the sample that a bad header belongs to."""
    named = key_of(damage.name)
    if named:
        return named[0]
    everything = sorted([*(f.group for f in report.images), *report.orphans], key=lambda group: group.start)
    before = after = None
    for group in everything:
        if max(member.header for member in group.members.values()) > damage.offset:
            after = group
            break
        before = group
    # A sample begins with its image: where the one after has its own behind the damage, that belongs to the one before.
    if after and (after.start < damage.offset or not any(s in SUFFIXES for s in after.members)):
        return after.key
    return before.key if before else None


def _judge_tar(report: ShardReport) -> None:
    explained = set()
    for damage in report.damage:
        key = _key_at(report, damage) if damage.kind == "bad header" or damage.name else None
        explained.add(key)
        report.add(damage.kind, key, damage.offset, damage.detail)
    for group in report.orphans:
        if group.key not in explained:
            report.add("missing image", group.key, group.start, f"there is only .{', .'.join(group.members)}")


def _fits(report: ShardReport, index: ShardIndex) -> bool:
    """Whether an index that has another checksum was made for this tar, before something in the tar changed."""
    rows = zip((index.blocks.astype(np.int64) * 512).tolist(), index.sizes.tolist(), index.crcs.tolist(), strict=True)
    places = {offset: (size, crc32) for offset, size, crc32 in rows}
    found = [(places.get(one.image.data), one) for one in report.images]
    same = sum(row is not None and row[0] == one.image.size for row, one in found)
    unchanged = any(row == (one.image.size, one.crc32) for row, one in found)
    return unchanged and (bool(report.damage) or same == len(found) == len(places))


def _judge_index(report: ShardReport, expected: int | None) -> None:
    """Find out whether the index fits the tar, and if it does, which images changed since it was made."""
    name, actual = os.path.basename(index_path(report.path)), report.crc32
    try:
        index = ShardIndex.load(index_path(report.path))
    except IndexProblem as problem:
        missing = not os.path.exists(index_path(report.path))
        report.add("missing index" if missing else "damaged index", None, None, f"{name}: {problem}")
        index = None
    if index and index.tar_crc32 != actual:
        fits = index.tar_crc32 == expected if expected is not None else _fits(report, index)
        if not fits:
            report.add("stale index", None, None, f"{name} was made for another tar of {index.tar_bytes} bytes")
            index = None
    report.index = index
    if index and index.tar_crc32 == actual:
        if expected not in (None, actual):
            report.add("manifest", None, None, "tar and index are not those of which the manifest tells the checksum")
    elif index:
        _compare(report, index)
    elif expected not in (None, actual) and not report.damage:
        report.add("wrong checksum", None, 0, f"the tar's is {actual:08x}, the manifest's {expected:08x}")


def _compare(report: ShardReport, index: ShardIndex) -> None:
    """Name the images and labels of a damaged tar that are not those of its index."""
    offsets = (index.blocks.astype(np.int64) * 512).tolist()
    beyond = [
        offset for offset, size in zip(offsets, index.sizes.tolist(), strict=True) if offset + size > report.bytes
    ]
    if beyond:
        detail = f"the index has {len(beyond)} image(s) that the tar no longer holds whole, the first is this"
        report.add("missing image", None, beyond[0], detail)
    rows = dict(zip(offsets, zip(index.crcs.tolist(), index.labels.tolist(), strict=True), strict=True))
    named = bool(report.damage)
    for i, found in enumerate(report.images):
        crc32, label = rows.get(found.image.data, (found.crc32, found.label))
        if crc32 != found.crc32:
            named = True
            if found.bad:  # one finding for one image, and this one tells more
                report.images[i] = replace(found, bad=f"{found.bad}; its checksum is not the index's either")
                continue
            detail = f"the image's is {found.crc32:08x}, the index's {crc32:08x}"
            report.add("wrong checksum", found.group.key, found.image.data, detail)
            report.images[i] = replace(found, bad="wrong checksum")
        elif label != found.label and "cls" in found.group.members:
            named = True
            place = found.group.members["cls"].data
            report.add("wrong checksum", found.group.key, place, f"the label is {found.label}, the index's {label}")
    if not named:
        report.add("wrong checksum", None, 0, "something in the tar changed that is neither image nor label")


def _judge_samples(report: ShardReport, labelled: bool) -> None:
    keys: set[str] = set()
    for found in report.images:
        key, place = found.group.key, found.image.data
        if found.bad and found.bad != "wrong checksum":
            kind, _, detail = found.bad.partition(": ")
            report.add(kind, key, place, detail)
        if labelled and found.label == -1:
            report.add("missing label", key, place, ".cls is missing or no number")
        if key in keys:
            report.add("duplicate key", key, place, "an earlier sample of this shard has the same")
        keys.add(key)
