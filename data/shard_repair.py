"""Shards mended: indexes and manifests made anew in place, and what damaged tars still hold saved in a clean copy."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .decode import UnreadableImage, decode
from .images import DataError
from .shard_check import ShardSet, examine_all, shard_sets
from .shard_examine import SUFFIXES, Finding, ShardReport
from .shard_samples import Sample, pack
from .shard_tar import Group, Member, key_of
from .shard_writer import ShardFile, save_manifest
from .shards import FORMAT, KINDS, MANIFEST, UNFINISHED, ShardPath, index_path, sync_folder

_OLD_MANIFEST = "manifest.before-repair.json"
Progress = Callable[[int, int], None]


@dataclass
class Repaired:
    """What `repair` did: the indexes and manifests it made, the folders it wrote, and what is lost or still damaged."""

    indexes: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    lost: list[Finding] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class _Saved:
    """An image that a damaged tar may still hold; `group` has the other members of its sample, as far as known."""

    key: str | None
    group: Group | None
    image: Member
    suffix: str
    label: int
    crc32: int | None  # by the index
    bad: str | None = None


def _known_to_the_index(report: ShardReport, rows: dict[int, tuple[int, int, int, int]]) -> list[_Saved]:
    """The images whose own header is damaged, which the index finds all the same."""
    found = {(one.image.size, one.crc32) for one in report.images}
    starts = sorted({*rows, *(one.image.data for one in report.images)})
    saved = []
    for offset, (size, crc32, label, kind) in rows.items():
        if (size, crc32) in found:  # where bytes were lost before it, it stands at another place now
            continue
        end = ([*starts, report.bytes])[bisect_right(starts, offset)]
        group = next((group for group in report.orphans if offset < group.start < end), None)
        named = next((key_of(d.name) for d in report.damage if d.offset == offset - 512), None)
        key = group.key if group else named[0] if named else None
        suffix = named[1] if named and named[1] in SUFFIXES else KINDS[kind].replace("other", "img")
        saved.append(_Saved(key, group, Member("", offset - 512, offset, size), suffix, label, crc32))
    return saved


def _plan(report: ShardReport) -> list[_Saved]:
    """Every image that a damaged tar may still hold, in the order of the tar."""
    rows: dict[int, tuple[int, int, int, int]] = {}
    if report.index is not None:
        index = report.index
        columns = (index.sizes.tolist(), index.crcs.tolist(), index.labels.tolist(), index.kinds.tolist())
        rows = dict(zip((index.blocks.astype(np.int64) * 512).tolist(), zip(*columns, strict=True), strict=True))
    plan = []
    for one in report.images:
        size, crc32, label, _ = rows.pop(one.image.data, (one.image.size, None, one.label, 0))
        image = replace(one.image, size=size)  # the index knows size and label even where a header does not
        plan.append(_Saved(one.group.key, one.group, image, one.suffix, label, crc32, one.bad))
    return sorted([*plan, *_known_to_the_index(report, rows)], key=lambda saved: saved.image.data)


def _sample(descriptor: int, saved: _Saved, key: str) -> Sample:
    """The sample to write; raises UnreadableImage where its image is not what was written or cannot be decoded."""
    data = os.pread(descriptor, saved.image.size, saved.image.data)
    crc32 = zlib.crc32(data)
    if saved.bad:
        raise UnreadableImage(key, saved.bad)
    if len(data) < saved.image.size:
        raise UnreadableImage(key, "the tar ends before it")
    if saved.crc32 not in (None, crc32):
        raise UnreadableImage(key, "wrong checksum")
    channels = decode(data, None).shape[2]
    members = {saved.suffix: data}
    if saved.label != -1:
        members["cls"] = str(saved.label).encode()
    for suffix, member in saved.group.members.items() if saved.group else ():
        members.setdefault(suffix, os.pread(descriptor, member.size, member.data))
    name = {"jpeg": "jpg"}.get(saved.suffix, saved.suffix)
    kind = name if name in KINDS else "other"
    return Sample(pack(key, members), 512, kind, len(data), crc32, saved.label, channels)


def _copy_readable(report: ShardReport, named: str, folder: str, lost: list[Finding]) -> dict[str, Any] | None:
    """Write what is readable of a damaged shard under its name to `folder`; what the manifest says of it, if any.

    `named` is what findings call the shard.
    """
    try:
        descriptor = os.open(report.path, os.O_RDONLY)
    except OSError:
        lost += report.findings
        return None
    file: ShardFile | None = None
    keys: set[str] = set()
    gone: dict[str | None, Finding] = {}
    plan = _plan(report)
    try:
        for saved in plan:
            key = saved.key or f"recovered-{saved.image.data}"
            while key in keys:
                key += "_"
            try:
                sample = _sample(descriptor, saved, key)
            except (UnreadableImage, OSError) as error:
                reason = error.reason if isinstance(error, UnreadableImage) else str(error.strerror)
                lost.append(Finding("missing image", named, saved.key, saved.image.data, reason))
                gone[saved.key] = lost[-1]
                continue
            keys.add(key)
            file = file or ShardFile(folder, report.name)
            file.add(sample)
        lost += [finding for finding in _gone_too(report, plan, keys) if finding.key not in gone]
        return file.finish() if file else None
    except BaseException:
        if file:
            file.abandon()
        raise
    finally:
        os.close(descriptor)


def _gone_too(report: ShardReport, plan: list[_Saved], keys: set[str]) -> list[Finding]:
    """What the findings tell of images of which neither header nor index is left."""
    kinds = ("truncated", "bad header", "missing image", "unreadable shard")
    found = [one for one in report.findings if one.kind in kinds and one.key not in keys]
    return [one for one in found if one.key is not None or (report.index is None and one.kind != "bad header")]


def _class_names(reports: list[tuple[str, dict[int, Member]]]) -> list[str] | None:
    """Class names from the `.json` of one sample of each label, None where they are not all there."""
    names: dict[int, str] = {}
    for path, members in reports:
        with open(path, "rb") as file:
            for label, member in members.items():
                if label not in names:
                    file.seek(member.data)
                    try:
                        names[label] = str(json.loads(file.read(member.size))["class"])
                    except (ValueError, KeyError, TypeError):
                        return None
    labels = sorted(names)
    return [names[label] for label in labels] if labels and labels == list(range(len(labels))) else None


def _first_of_each_label(report: ShardReport) -> dict[int, Member]:
    first: dict[int, Member] = {}
    for one in report.images:
        if one.label >= 0 and "json" in one.group.members:
            first.setdefault(one.label, one.group.members["json"])
    return first


def _free(out: str) -> str:
    """`out` as a path that is still free; raises DataError where something is there."""
    out = os.path.abspath(os.path.expanduser(out))
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise DataError(f"{out} holds something already: give --out a new or an empty folder.")
    return out


def _link(path: str, folder: str) -> None:
    """The same file in `folder`: a second name where the disk allows it, otherwise a copy; raises OSError."""
    target = os.path.join(folder, os.path.basename(path))
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _mend(
    shards: ShardSet, aside: str | None, done: Repaired, *, deep: bool, threads: int, progress: Progress | None
) -> None:
    """Mend one set: in place, and with `aside` also as a copy there."""
    entries: list[dict[str, Any]] = []
    labels: list[tuple[str, dict[int, Member]]] = []
    old = {entry["name"]: entry for entry in (shards.manifest or {"shards": ()})["shards"]}
    damaged = False
    for report in examine_all(shards, deep=deep, threads=threads, progress=progress):
        kinds = {finding.kind for finding in report.findings}
        if not report.whole:
            damaged = True
            if aside is None:
                done.left += [finding for finding in report.findings if finding.severity == 2]
            elif entry := _copy_readable(report, shards.named(report.name), aside, done.lost):
                entries.append(entry)
            continue
        remade = bool(kinds & {"missing index", "damaged index", "stale index"})
        if remade:
            try:
                report.new_index().save(index_path(report.path))
                done.indexes.append(index_path(report.path))
            except OSError:
                if aside is None:  # a copy can also be made of what cannot be written to
                    raise
        if aside is not None:
            _link(report.path, aside)
            if remade:
                report.new_index().save(os.path.join(aside, os.path.basename(index_path(report.path))))
            else:
                _link(index_path(report.path), aside)
        known = old.get(report.name, {})
        facts = {"samples": len(report.images), "bytes": report.bytes, "crc32": report.crc32}
        same = known.get("crc32") == report.crc32
        entries.append({"name": report.name, **facts, "channels": known.get("channels", {}) if same else {},
                        **({"until": known["until"]} if same and "until" in known else {})})  # fmt: skip
        labels.append((report.path, _first_of_each_label(report)))
    if not entries:
        return
    manifest = dict(shards.manifest) if shards.manifest else {
        "format": "elsewhere shards", "version": FORMAT, "source": {}, "options": {}, "classes": _class_names(labels)
    }  # fmt: skip
    manifest["shards"] = entries
    if not all("until" in entry for entry in entries):
        manifest["options"] = {}  # `shards write` could not go on after these shards
    if aside is not None:
        # No later `shards write` is to go on with a copy as if it were its own work.
        split = manifest["source"].get("split")
        about = {"path": shards.folder, **({"split": split} if split else {})}
        manifest.update(source=about, options={}, repaired=True)
        save_manifest(aside, MANIFEST, manifest)
    elif shards.complete and not damaged and _differs(shards, entries):
        path = os.path.join(shards.folder, MANIFEST)
        if os.path.exists(path):
            os.replace(path, os.path.join(shards.folder, _OLD_MANIFEST))
        save_manifest(shards.folder, MANIFEST, manifest)
        done.manifests.append(path)


def _differs(shards: ShardSet, entries: list[dict[str, Any]]) -> bool:
    """Whether the manifest has to be made anew; an unfinished set gets its own from the writer."""
    if os.path.exists(os.path.join(shards.folder, UNFINISHED)):
        return False
    if shards.manifest is None:
        return True
    facts = ("name", "samples", "bytes", "crc32")
    before, now = ([tuple(e.get(f) for f in facts) for e in some] for some in (shards.manifest["shards"], entries))
    return before != now


def repair(
    path: ShardPath, out: str | os.PathLike[str] | None = None, *, deep: bool = False, threads: int = 1,
    progress: Progress | None = None,
) -> Repaired:  # fmt: skip
    """Make missing and stale indexes and manifests anew in place, where the tars beside them are whole.

    With `out`, a new or empty folder, write a copy there that has no damage: whole shards as they are (a second name
    for the same file where the disk allows it), damaged ones with the images that are still readable, found by their
    headers or by the index. `deep` also leaves out images of whole shards that cannot be decoded. The tars themselves
    are never changed. Raises DataError where `path` names no shards, or nothing can be written.
    """
    sets, done = shard_sets(path), Repaired()
    target = _free(os.fspath(out)) if out is not None else None
    aside = os.path.join(os.path.dirname(target), f".writing-{os.path.basename(target)}") if target else None
    try:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
        for shards in sets:
            inner = aside
            if aside:
                inner = os.path.join(aside, os.path.basename(shards.folder)) if len(sets) > 1 else aside
                os.makedirs(inner)
            _mend(shards, inner, done, deep=deep, threads=threads, progress=progress)
        if aside and target:
            if not any(names for _, _, names in os.walk(aside)):
                raise DataError(f"Nothing in {path} can be read: there is no copy to write.")
            if os.path.isdir(target):
                os.rmdir(target)
            os.replace(aside, target)
            sync_folder(os.path.dirname(target))
            done.copies.append(target)
    except OSError as error:
        raise DataError(
            f"{error.filename or target or path} cannot be written ({error.strerror}): make room or choose another "
            "folder, and run the same command again."
        ) from None
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
    return done
