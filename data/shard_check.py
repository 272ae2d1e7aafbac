"""Sets of shards verified: every shard examined, and the set as a whole against its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .images import DataError
from .shard_examine import INDEXES, Finding, ShardReport, examine
from .shards import UNFINISHED, ShardPath, find_shards, is_shard_folder, read_manifest, shard_splits, tars_in

Progress = Callable[[int, int], None]


@dataclass
class ShardSet:
    """Shards that belong together: those of one folder, with its manifest, or those that a pattern names there."""

    folder: str
    paths: list[str]
    manifest: dict[str, Any] | None
    complete: bool  # all of the folder's
    findings: list[Finding]
    within: str = ""  # the folder, from the one that was given: train and val have shards of the same names

    def named(self, name: str) -> str:
        """A tar's `name` as findings tell it."""
        return os.path.join(self.within, name)

    def expected(self, path: str) -> int | None:
        """The crc32 of a tar by the manifest."""
        for entry in self.manifest["shards"] if self.manifest else ():
            if entry["name"] == os.path.basename(path):
                return entry["crc32"]
        return None


def shard_sets(path: ShardPath) -> list[ShardSet]:
    """The sets that `path` names (as for `Shards`, but train and val both); raises DataError where it names none."""
    if isinstance(path, (str, os.PathLike)):
        folder = os.path.expanduser(os.fspath(path))
        splits = shard_splits(folder)
        if splits:
            return [_folder_set(os.path.join(folder, split), split) for split in splits]
        if os.path.isdir(folder):
            if not is_shard_folder(folder):
                raise DataError(f"{folder} holds no shards: give a folder that `elsewhere shards write` made.")
            return [_folder_set(folder)]
    tars = find_shards(path)
    folders = list(dict.fromkeys(map(os.path.dirname, tars)))
    sets = []
    for folder in folders:
        within = folder if len(folders) > 1 else ""
        here = [tar for tar in tars if os.path.dirname(tar) == folder]
        sets.append(ShardSet(folder, here, *_manifest(folder), False, [], within))
    return sets


def _manifest(folder: str) -> tuple[dict[str, Any] | None]:
    try:
        return (read_manifest(folder),)
    except DataError:
        return (None,)


def _folder_set(folder: str, within: str = "") -> ShardSet:
    findings, paths = [], tars_in(folder)
    here = within or os.path.basename(os.path.abspath(folder))
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        manifest = None
        findings.append(Finding("manifest", here, None, None, str(error)))
    if os.path.exists(os.path.join(folder, UNFINISHED)):
        detail = "the same `elsewhere shards write` goes on where it was cut off"
        findings.append(Finding("unfinished", here, None, None, detail))
    if manifest:
        listed = [os.path.join(folder, entry["name"]) for entry in manifest["shards"]]
        for path in sorted(set(paths) - set(listed)):
            name = os.path.join(within, os.path.basename(path))
            findings.append(Finding("manifest", name, None, None, "the manifest does not list it"))
        paths = listed + sorted(set(paths) - set(listed))
    return ShardSet(folder, paths, manifest, True, findings, within)


@dataclass
class Report:
    """What `verify` found."""

    path: str
    shards: int
    samples: int
    bytes: int
    findings: list[Finding]
    mended_in_place: bool = False  # whether an index or a manifest is among them that `repair` makes anew

    @property
    def severity(self) -> int:
        """0 where nothing is wrong, 1 for warnings, 2 for damage."""
        return max((finding.severity for finding in self.findings), default=0)

    def to_json(self) -> dict[str, Any]:
        """The report as a dictionary of plain values."""
        findings = [{**asdict(finding), "severity": finding.severity} for finding in self.findings]
        return {**asdict(self), "severity": self.severity, "findings": findings}


def examine_all(
    shards: ShardSet, *, deep: bool = False, threads: int = 1, progress: Progress | None = None
) -> Iterator[ShardReport]:
    """The report of every shard of a set, in order. `progress(shards, of)` is called after each."""
    labelled = bool(shards.manifest and shards.manifest.get("classes"))
    # Threads: reading, checksums and decoding leave Python's lock to others.
    with ThreadPoolExecutor(max(1, threads)) as pool:
        done = pool.map(lambda p: examine(p, shards.expected(p), deep=deep, labelled=labelled), shards.paths)
        for number, report in enumerate(done, 1):
            report.findings = [replace(finding, shard=shards.named(finding.shard)) for finding in report.findings]
            if progress:
                progress(number, len(shards.paths))
            yield report


def _key_hashes(report: ShardReport) -> np.ndarray:
    """64 bits of every key, `[N]` uint64: a million keys as text would take 100 MB."""
    keys = (found.group.key.encode("utf-8", "surrogateescape") for found in report.images)
    return np.array([int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) for key in keys], dtype=np.uint64)


def _check_manifest(shards: ShardSet, report: ShardReport) -> Iterator[Finding]:
    """The entry of a whole shard has the right counts."""
    for entry in shards.manifest["shards"] if shards.manifest else ():
        if entry["name"] == report.name and entry["crc32"] == report.crc32:
            for key, value in (("samples", len(report.images)), ("bytes", report.bytes)):
                if entry.get(key) != value:
                    detail = f"the manifest says {entry.get(key)} {key}, but there are {value}"
                    yield Finding("manifest", shards.named(report.name), None, None, detail)


def verify(path: ShardPath, *, deep: bool = False, threads: int = 1, progress: Progress | None = None) -> Report:
    """Look at every shard that `path` names (see `Shards`; both train and val) without changing anything.

    `deep` decodes every image. Raises DataError where `path` names no shards.
    """
    total = Report(str(path), 0, 0, 0, [])
    for shards in shard_sets(path):
        findings = [*shards.findings]
        hashes: list[np.ndarray] = []
        for report in examine_all(shards, deep=deep, threads=threads, progress=progress):
            total.shards += 1
            total.samples += len(report.images)
            total.bytes += report.bytes
            findings += [*report.findings, *_check_manifest(shards, report)]
            hashes.append(_key_hashes(report))
        findings += _across(shards, hashes)
        total.findings += findings
        # The manifest of a folder of which a pattern names a part is left as it is.
        remade = INDEXES | {"manifest"} if shards.complete else INDEXES
        total.mended_in_place |= any(finding.kind in remade for finding in findings)
    return total


def _across(shards: ShardSet, hashes: list[np.ndarray]) -> Iterator[Finding]:
    """Keys that stand in more than one shard of a set."""
    own = [np.unique(one) for one in hashes]
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *own]), return_counts=True)
    repeated = values[counts > 1]
    if not len(repeated):
        return
    seen: set[int] = set()
    for path, one in zip(shards.paths, own, strict=True):
        wanted = set(one[np.isin(one, repeated)].tolist())
        if wanted & seen:
            report = examine(path)
            for found, value in zip(report.images, _key_hashes(report).tolist(), strict=True):
                if value in wanted & seen:
                    detail = "a sample of an earlier shard has the same"
                    place = shards.named(report.name), found.group.key, found.image.data
                    yield Finding("duplicate key", *place, detail)
        seen |= wanted
