"""How good a frozen encoder is: k-NN and a linear probe of its features on held-out images."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from ..data.images import Source
from ..data.streams import generator
from ..data.views import CentreView, Views, read_views
from .config import Probe
from .engine.base import Engine
from .evaluate.low_shot import few_labels
from .evaluate.nearest import Nearest


def features(
    engine: Engine,
    source: Source,
    indices: np.ndarray,
    interpolation: str,
    workers: int,
    batch: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean patch tokens `[n, width]` float32 and labels `[n]` of the images at `indices`, in their order.

    The encoder is the one that the method wants observed (the teacher, where there is one). Every rank takes a share
    and gets all; images that cannot be read are left out.
    """
    world, encoder = engine.world, engine.method.encoder
    size = encoder.image_size
    views = Views(source, indices[world.rank :: world.size], CentreView(size, interpolation), batch)
    batches = read_views(views, list(range(len(views))), workers)
    found, labels, places = [np.empty((0, encoder.num_features), np.float32)], [], []
    nothing = torch.zeros(1, encoder.channels, *size)
    # The same number of forward passes on every rank, since weights may have to be gathered for each.
    for _ in range(-(-len(indices) // (world.size * batch))):
        viewed = next(batches, None)
        asked = engine.ask("observe", (viewed.images if viewed and viewed.places else nothing).to(world.device))
        if viewed and viewed.places:
            found.append(asked.cpu().numpy())
            labels += viewed.labels
            places += [world.rank + world.size * i for i in viewed.places]
    parts = world.gather_host((np.concatenate(found), labels, places))
    order = np.argsort(np.concatenate([part[2] for part in parts]))
    everything = np.concatenate([part[0] for part in parts])
    return everything[order], np.concatenate([part[1] for part in parts]).astype(np.int64)[order]


def knn_accuracy(train: np.ndarray, labels: np.ndarray, val: np.ndarray, truth: np.ndarray, neighbours: int) -> float:
    """Share of `val` `[m, D]` whose class wins the vote of its nearest in `train`, as `evaluate.nearest` has it."""
    votes = Nearest(train, labels).votes(val, [neighbours])[0]
    return float((votes.argmax(dim=1).numpy() == truth).mean())


def linear_accuracy(train: np.ndarray, labels: np.ndarray, val: np.ndarray, truth: np.ndarray) -> float:
    """Share of `val` `[m, D]` that logistic regression on `train`, standardised by training statistics, gets right."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 iterations are the probe's definition
        return float(model.fit(train, labels).score(val, truth))


def probe(
    engine: Engine,
    train: Source,
    val: Source,
    section: Probe,
    interpolation: str,
    seed: int,
    workers: int,
) -> dict[str, Any] | None:
    """k-NN and linear accuracy (0…1) of the frozen encoder; None without labels of two classes or more.

    With few labels per class the figures are means over `draws` choices of them, beside their standard deviation.
    """
    chosen = [
        generator(seed, f"probe {split}", 0).permutation(len(source))[:count]
        for split, source, count in (("train", train, section.train_images), ("val", val, section.val_images))
    ]
    if len({train.label(int(i)) for i in chosen[0][:1000]} - {-1}) < 2 or not len(chosen[1]):
        return None
    world = engine.world
    known, labels = features(engine, train, chosen[0], interpolation, workers)
    asked, truth = features(engine, val, chosen[1], interpolation, workers)
    result: dict[str, Any] | None = None
    if world.first:
        scores = []
        for draw in range(section.draws if section.labels_per_class else 1):
            picked = slice(None)
            if section.labels_per_class:
                picked = few_labels(labels, section.labels_per_class, seed, draw)
            some = known[picked], labels[picked], asked, truth
            scores.append((knn_accuracy(*some, section.neighbours), linear_accuracy(*some)))
        mean, spread = np.mean(scores, axis=0), np.std(scores, axis=0)
        result = {"knn": mean[0], "linear": mean[1], "train_images": len(labels), "val_images": len(truth)}
        if len(scores) > 1:
            result |= {"knn_std": spread[0], "linear_std": spread[1], "labels_per_class": section.labels_per_class}
        result = {key: round(float(v), 5) if isinstance(v, float) else v for key, v in result.items()}
    return world.gather_host(result)[0]
