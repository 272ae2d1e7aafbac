"""The probes: each takes a session and gives its protocol and its figures, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.augment import Augment
from ...data.streams import generator
from ...data.views import RandomView
from ..errors import UserError
from . import attentive, linear, low_shot, nearest
from .linear import Heads, Setting, train_epoch
from .low_shot import Shots, without_images
from .nearest import Nearest
from .scores import counts, figure, over_draws
from .session import Session
from .store import Features

LAYERS = 4  # of the concatenation that VISSL and I-JEPA call the last four


@dataclass(frozen=True)
class Settings:
    """Of all probes; `layers` are the inputs of the linear one, last and last4."""

    pool: str = "patch"
    neighbours: Sequence[int] = nearest.NEIGHBOURS
    layers: Sequence[str] = ("last", "last4")
    rates: Sequence[float] = linear.RATES
    decays: Sequence[float] = linear.DECAYS
    epochs: int = linear.EPOCHS
    augment: bool = False
    select: str = "val"
    attentive_rates: Sequence[float] = attentive.RATES
    attentive_epochs: int = attentive.EPOCHS
    shots: Sequence[Shots] = (Shots("1%"),)
    lists: Sequence[Path] = ()
    draws: int = 3
    strength: float = low_shot.LAMBDA


@dataclass
class Outcome:
    """A probe's protocol, its figures, those that stand for it, and sentences that belong to them."""

    protocol: dict[str, Any]
    figures: list[dict[str, Any]]
    best: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def check_pool(session: Session, pool: str) -> None:
    """UserError where the encoder has no class token and one is wanted."""
    if pool != "patch" and not session.method.encoder.num_prefix_tokens:
        raise UserError(f"--pool {pool} needs a class token, and {session.what} has none: use --pool patch.")


def _blocks(features: np.ndarray, size: int = 4096) -> Iterator[tuple[slice, Tensor]]:
    for first in range(0, len(features), size):
        part = slice(first, first + size)
        yield part, torch.from_numpy(np.array(features[part]))


def _count(score: Callable[[Tensor], Tensor], features: np.ndarray, truth: np.ndarray, device: Any) -> np.ndarray:
    """`[S, 2]` right of features, by scores `[S, n, classes]` of a block of them."""
    total: Any = 0
    for part, block in _blocks(features):
        total = total + counts(score(block.to(device)), torch.from_numpy(truth[part]).to(device))
    return total


def _highest(figures: list[dict[str, Any]], key: str = "top1") -> dict[str, Any]:
    return max(figures, key=lambda row: row[key])


def knn(session: Session, settings: Settings) -> Outcome:
    """k nearest neighbours by cosine of standardised features, weighted by exp(cosine / 0.07)."""
    train, val = session.pooled("train"), session.pooled("val")
    known = Nearest(train.pooled(pool=settings.pool), train.labels, session.world.device)
    asked, ks = val.pooled(pool=settings.pool), settings.neighbours

    def job(first: int) -> np.ndarray:
        part = slice(first, first + nearest.BLOCK)
        return counts(known.votes(asked[part], ks), torch.from_numpy(val.labels[part]).to(session.world.device))

    right = sum(session.share([lambda f=f: job(f) for f in range(0, len(val), nearest.BLOCK)]))
    classes = len(session.classes)
    figures = [
        figure(row, len(val), classes, setting=f"k = {k}", k=k) for row, k in zip(np.asarray(right), ks, strict=True)
    ]
    protocol = {
        "features": f"last layer, {_POOLS[settings.pool]}", "temperature": nearest.TEMPERATURE,
        "neighbours": list(ks), "standardised": "by training statistics", "metric": "cosine",
        "best": "highest of the k on val",
    }  # fmt: skip
    return Outcome(protocol, figures, [_highest(figures)])


_POOLS = {
    "patch": "mean of patch tokens",
    "class": "class token",
    "both": "class token beside the mean of patch tokens",
}
_INPUTS = {"last": "last layer", "last4": "last four layers"}


def linear_probe(session: Session, settings: Settings) -> Outcome:
    """Linear classifiers by the VISSL protocol, all rates and decays at once."""
    train_rows, select_rows = _held_out(session, settings)
    chosen = linear.settings(settings.rates, settings.decays)
    world, seed, classes = session.world, session.config.seed, len(session.classes)
    val = session.pooled("val")
    inputs = [name for name in settings.layers if name == "last" or session.layers > 1]
    mine = {name for i, name in enumerate(inputs) if i % world.size == world.rank}
    heads: dict[str, Heads] = {}

    def epoch_of(found: Features, epoch: int) -> None:
        for name in sorted(mine):
            values = found.pooled(name, settings.pool)
            if name not in heads:
                heads[name] = Heads(values.shape[1], classes, chosen, world.device, seed)
            rows = train_rows(found)
            train_epoch(heads[name], values[rows], found.labels[rows], seed, epoch, settings.epochs)

    if settings.augment:
        augment = Augment(
            size=session.view.size, crop_scale=(0.08, 1.0), interpolation=session.view.interpolation, flip=0.5,
            blur=0.0, grayscale=0.0,
        )  # fmt: skip
        for epoch in range(settings.epochs):
            epoch_of(session.augmented(RandomView(augment, seed, epoch), epoch), epoch)
    else:
        train = session.pooled("train")
        world.agree(lambda: [epoch_of(train, epoch) for epoch in range(settings.epochs)])

    def measure(name: str, found: Features, rows: np.ndarray | slice) -> np.ndarray | None:
        if name not in heads:
            return None
        return _count(heads[name].scores, found.pooled(name, settings.pool)[rows], found.labels[rows], world.device)

    def everywhere(found: Features, rows: np.ndarray | slice) -> dict[str, np.ndarray]:
        parts = world.gather_host({name: measure(name, found, rows) for name in mine})
        return {name: value for part in parts for name, value in part.items()}

    right = everywhere(val, slice(None))
    chosen_on = None
    if settings.select == "held-out":
        centre = session.pooled("train")
        chosen_on, held = everywhere(centre, select_rows(centre)), len(select_rows(centre))
    figures, best = [], []
    for name in inputs:
        rows = []
        for i, setting in enumerate(chosen):
            row = figure(right[name][i], len(val), classes, setting=_setting(name, setting), input=name,
                         lr=setting.lr, weight_decay=setting.weight_decay)  # fmt: skip
            if chosen_on is not None:
                row["held_out"] = round(int(chosen_on[name][i][0]) / held, 5)
            rows.append(row)
        figures += rows
        best.append(_highest(rows, "held_out" if chosen_on is not None else "top1"))
    protocol = {
        "features": [f"{_INPUTS[name]}, {_POOLS[settings.pool]}" for name in inputs], "like": "VISSL",
        "epochs": settings.epochs, "batch": linear.BATCH, "optimiser": "SGD, Nesterov momentum 0.9",
        "rates_fall": f"tenfold after epochs {', '.join(map(str, linear.MILESTONES))} of {linear.EPOCHS}",
        "rates": list(settings.rates), "weight_decays": list(settings.decays), "batch_norm": "without parameters",
        "views": "random resized crop 0.08–1, flip, each epoch" if settings.augment else "centre crop, cached",
        "best": "highest on val, as published" if chosen_on is None else "highest on a tenth of train, held out",
        "pool": settings.pool,
    }  # fmt: skip
    return Outcome(protocol, figures, best)


def _setting(name: str, setting: Setting) -> str:
    return f"{_INPUTS[name]}, lr {setting.lr:g}, decay {setting.weight_decay:g}"


def _held_out(session: Session, settings: Settings) -> tuple[Callable[[Features], Any], Callable[[Features], Any]]:
    """Functions that give the rows of training features that train, and those that choose."""
    if settings.select == "val":
        return (lambda found: slice(None)), (lambda found: slice(0, 0))
    all_indices = session.chosen["train"]
    order = generator(session.config.seed, "probe held out", 0).permutation(all_indices)
    held = np.sort(order[: max(1, len(order) // 10)])
    return (
        lambda found: np.flatnonzero(~np.isin(found.indices, held)),
        lambda found: np.flatnonzero(np.isin(found.indices, held)),
    )


def attentive_probe(session: Session, settings: Settings) -> Outcome:
    """Attentive probes of the last layer's tokens, a learning rate each."""
    train, val = session.tokens("train"), session.tokens("val")
    encoder, classes, world = session.method.encoder, len(session.classes), session.world

    def job(rate: float) -> np.ndarray:
        probes = attentive.AttentiveProbes(
            encoder.num_features, encoder.size.heads, classes, [rate], world.device, session.config.seed
        )
        probes.fit(train.values, train.labels, settings.attentive_epochs, session.config.seed)
        return _count(probes.scores, val.values, val.labels, world.device)[0]

    rates = settings.attentive_rates
    right = session.share([lambda rate=rate: job(rate) for rate in rates])
    figures = [
        figure(row, len(val), classes, setting=f"lr {rate:g}", lr=rate) for row, rate in zip(right, rates, strict=True)
    ]
    protocol = {
        "features": "all tokens of the last layer, cached in float16", "like": "V-JEPA's attentive probe",
        "block": f"cross-attention of one learned query, {encoder.size.heads} heads, MLP ratio 4, linear classifier",
        "optimiser": f"AdamW, weight decay {attentive.WEIGHT_DECAY}", "epochs": settings.attentive_epochs,
        "batch": attentive.BATCH, "schedule": "5 % warm-up, cosine to 0", "rates": list(rates),
        "views": "centre crop, cached", "best": "highest on val",
    }  # fmt: skip
    return Outcome(protocol, figures, [_highest(figures)])


def low_shot_probe(session: Session, settings: Settings) -> Outcome:
    """Logistic regression on few labelled images: drawn, or those of list files."""
    seed, classes = session.config.seed, len(session.classes)
    labels, whole = session.labels("train"), session.chosen["train"]
    draws: list[tuple[str, np.ndarray]] = []
    if settings.lists:
        for path in settings.lists:
            draws.append((path.name, session.listed(path)))
    else:
        for shots in settings.shots:
            draws += [(str(shots), np.sort(whole[shots.draw(labels, seed, d)])) for d in range(settings.draws)]
    union = session.pooled("train", np.unique(np.concatenate([indices for _, indices in draws])))
    val = session.pooled("val")
    asked = val.pooled(pool=settings.pool)

    def job(indices: np.ndarray) -> tuple[np.ndarray, bool, int]:
        few = union.take(indices)
        fitted = low_shot.fit(few.pooled(pool=settings.pool), few.labels, classes, settings.strength)
        right = _count(lambda block: torch.from_numpy(fitted.scores(block.numpy()))[None], asked, val.labels, "cpu")
        return right[0], fitted.converged, len(few)

    found = session.share([lambda indices=indices: job(indices) for _, indices in draws])
    figures, notes = [], []
    for name in dict.fromkeys(name for name, _ in draws):
        group = [result for (other, _), result in zip(draws, found, strict=True) if other == name]
        rows = [figure(right, len(val), classes) for right, _, _ in group]
        figures.append(over_draws(rows, setting=f"{name} ({group[0][2]:,} images)", images=group[0][2], shots=name))
    for name, indices in draws:
        missing = without_images(union.take(indices).labels, session.classes)
        if missing and f"{name}: {missing}" not in notes:
            notes.append(f"{name}: {missing}")
    strength = low_shot.inverse_strength(settings.strength, classes)
    protocol = {
        "features": f"last layer, {_POOLS[settings.pool]}", "lambda": settings.strength, "C": strength,
        "classifier": "multinomial logistic regression without intercept, L-BFGS", "steps": low_shot.EPOCHS,
        "standardised": "by training statistics", "rotated": "to principal components",
        "labels": [str(path) for path in settings.lists] or [str(shots) for shots in settings.shots],
        "draws": 1 if settings.lists else settings.draws,
    }  # fmt: skip
    return Outcome(protocol, figures, figures, notes)


PROBES: dict[str, Callable[[Session, Settings], Outcome]] = {
    "knn": knn, "low-shot": low_shot_probe, "linear": linear_probe, "attentive": attentive_probe,
}  # fmt: skip


def needed_layers(kinds: Sequence[str], settings: Settings) -> int:
    """How many last layers the probes look at."""
    return LAYERS if "linear" in kinds and "last4" in settings.layers else 1


def run(session: Session, kinds: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """The results of probes, in the form of `results.json`, on every rank."""
    # What is wrong with these is said before minutes of extraction.
    if any(kind != "attentive" for kind in kinds):
        check_pool(session, settings.pool)
    for path in settings.lists if "low-shot" in kinds else ():
        session.listed(path)
    if any(kind in ("knn", "linear") for kind in kinds) and not settings.augment:
        session.pooled("train")
    entries = []
    for kind in kinds:
        outcome = PROBES[kind](session, settings)
        for note in outcome.notes:
            session.say(note)
        entries.append({
            "probe": kind, "protocol": outcome.protocol, **session.facts(), "figures": outcome.figures,
            "best": outcome.best, "notes": outcome.notes,
        })  # fmt: skip
    return entries
