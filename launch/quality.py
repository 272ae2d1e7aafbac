"""How good a frozen encoder is: k-NN and a linear probe of its features on held-out images."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.augment import evaluation_view
from ..data.decode import UnreadableImage
from ..data.images import Source
from ..data.streams import generator
from .config import Probe
from .engine.base import Engine


class EvaluationViews(Dataset):
    """Evaluation views of chosen images; an unreadable one counts as none."""

    def __init__(self, source: Source, indices: np.ndarray, size: tuple[int, int], interpolation: str):
        self.source, self.indices, self.size, self.interpolation = source, indices, size, interpolation

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int] | None:
        index = int(self.indices[i])
        try:
            image = self.source.read(index)
        except UnreadableImage:
            return None
        return evaluation_view(image, self.size, self.interpolation), self.source.label(index), i


def stack_views(items: list) -> tuple[torch.Tensor, list[int], list[int]]:
    items = [item for item in items if item is not None]
    images = torch.stack([image for image, _, _ in items]) if items else torch.empty(0)
    return images, [label for _, label, _ in items], [place for _, _, place in items]


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
    views = EvaluationViews(source, indices[world.rank :: world.size], encoder.image_size, interpolation)
    loader = iter(DataLoader(views, batch, num_workers=workers, collate_fn=stack_views))
    found, labels, places = [np.empty((0, encoder.num_features), np.float32)], [], []
    nothing = torch.zeros(1, encoder.channels, *encoder.image_size)
    # The same number of forward passes on every rank, since weights may have to be gathered for each.
    for _ in range(-(-len(indices) // (world.size * batch))):
        images, label, place = next(loader, (nothing[:0], [], []))
        asked = engine.ask("observe", (images if len(images) else nothing).to(world.device))
        if len(images):
            found.append(asked.cpu().numpy())
            labels += label
            places += [world.rank + world.size * i for i in place]
    parts = world.gather_host((np.concatenate(found), labels, places))
    order = np.argsort(np.concatenate([part[2] for part in parts]))
    everything = np.concatenate([part[0] for part in parts])
    return everything[order], np.concatenate([part[1] for part in parts]).astype(np.int64)[order]


def few_labels(labels: np.ndarray, per_class: int, seed: int, draw: int) -> np.ndarray:
    """Indices of `per_class` images of every class (all, of a class that has fewer), another choice for each draw."""
    rng = generator(seed, "few labels", draw)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)])


def knn_accuracy(train: np.ndarray, labels: np.ndarray, val: np.ndarray, truth: np.ndarray, neighbours: int) -> float:
    """Share of `val` `[m, D]` whose class wins the vote of its nearest in `train`, weighted by exp(cosine / 0.07).

    Features are standardised by training statistics first: an encoder without class token has a large common mean
    (its positions), beside which the cosines of any two images differ by rounding alone.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp(-distances / 0.07)

    classifier = KNeighborsClassifier(
        min(neighbours, len(train)),
        weights=weights,  # pyright: ignore
        metric="cosine",
        algorithm="brute",
    )
    scaler = StandardScaler().fit(train)
    return float(classifier.fit(scaler.transform(train), labels).score(scaler.transform(val), truth))


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
