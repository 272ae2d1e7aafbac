"""Logistic regression on few labelled images: the released low-shot protocol, by scikit-learn."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...data.images import Source
from ...data.shard_names import original_name
from ...data.streams import generator
from ..errors import UserError
from .nearest import statistics

LAMBDA, EPOCHS = 0.0025, 100


def few_labels(labels: np.ndarray, per_class: int, seed: int, draw: int) -> np.ndarray:
    """Indices of `per_class` images of every class (all, of a class that has fewer), another choice for each draw."""
    rng = generator(seed, "few labels", draw)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)])


def inverse_strength(strength: float, classes: int) -> float:
    """scikit-learn's `C` for the released probe's λ (`--lambd`).

    The released code hands λ / N to a solver that minimises the mean loss plus the penalty,

        1/N Σ_i loss(W x_i, y_i) + λ / (2 N) ‖W‖²,

    where the loss is the multinomial cross-entropy (natural logarithm) and W has a row for every class. scikit-learn
    minimises C Σ_i loss + ½ ‖W‖², its loss a sum and not a mean. Times N / λ the first is the second with C = 1 / λ,
    whatever N is: 400 for λ = 0.0025. Of two classes scikit-learn fits one row w with loss log(1 + exp(-± w x)), which
    at the optimum is W's difference of two opposite rows, ‖w‖² = 2 ‖W‖²: there C = 2 / λ.
    """
    return (2.0 if classes == 2 else 1.0) / strength


@dataclass
class Logistic:
    """A fitted classifier: `scores` of features `[m, D]` are `[m, classes]`, those of absent classes lowest."""

    mean: np.ndarray
    std: np.ndarray
    rotation: np.ndarray  # [D, components]
    weights: np.ndarray  # [present, components]
    present: np.ndarray
    classes: int
    converged: bool

    def scores(self, features: np.ndarray) -> np.ndarray:
        found = (features.astype(np.float64) - self.mean) / self.std @ self.rotation @ self.weights.T
        out = np.full((len(features), self.classes), found.min() - 1.0 if found.size else 0.0)
        out[:, self.present] = found
        return out


def rotation(standardised: np.ndarray) -> np.ndarray:
    """The principal directions `[D, components]` of `[n, D]`, without those in which nothing varies.

    A rotation leaves a solution under an l2 penalty where it was; it brings the solver there in fewer steps, and with
    fewer images than features in a smaller space, since nothing is learned across what does not vary.
    """
    n, width = standardised.shape
    if n < width:
        _, values, directions = np.linalg.svd(standardised, full_matrices=False)
        directions = directions.T
    else:
        squared, directions = np.linalg.eigh(standardised.T @ standardised)
        values, directions = np.sqrt(squared[::-1].clip(min=0)), directions[:, ::-1]
    return directions[:, values > 1e-7 * values.max()]  # float32 knows no smaller ones


def fit(
    features: np.ndarray, labels: np.ndarray, classes: int, strength: float = LAMBDA, epochs: int = EPOCHS
) -> Logistic:
    """Multinomial logistic regression without intercept on standardised, rotated features `[n, D]`.

    Features are standardised by training statistics, with the unbiased deviation (the released code standardised test
    features by their own). At most `epochs` steps of L-BFGS are taken, a pass over the images each.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = statistics(features, ddof=1)
    standardised = (features.astype(np.float64) - mean) / std
    turned = rotation(standardised)
    present = np.unique(labels)
    model = LogisticRegression(
        C=inverse_strength(strength, len(present)), fit_intercept=False, max_iter=epochs, tol=1e-6
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many steps are the probe's definition
        model.fit(standardised @ turned, labels)
    weights = np.concatenate([-model.coef_, model.coef_]) / 2 if len(present) == 2 else model.coef_
    return Logistic(mean, std, turned, weights, present, classes, bool(np.max(model.n_iter_) < epochs))


@dataclass(frozen=True)
class Shots:
    """How many labelled images: a number of each class, or a share of each."""

    text: str

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?%", self.text) or (self.text.endswith("%") and not self.share):
            raise UserError(f"--shots {self.text} is no number of images and no share: write e.g. 1%,1,2,5.")

    @property
    def share(self) -> float:
        """Of the images of each class; 0 for a number of them."""
        return float(self.text[:-1]) / 100 if self.text.endswith("%") else 0.0

    def __str__(self) -> str:
        return self.text if self.share else f"{self.text} per class"

    def draw(self, labels: np.ndarray, seed: int, draw: int) -> np.ndarray:
        """Places in `labels` `[n]`, at least one of each class that has any; another choice for each draw."""
        if not self.share:
            return few_labels(labels, int(self.text), seed, draw)
        rng = generator(seed, "share of labels", draw)
        found = []
        for c in np.unique(labels):
            of_class = rng.permutation(np.flatnonzero(labels == c))
            found.append(of_class[: max(1, round(self.share * len(of_class)))])
        return np.concatenate(found)


@dataclass
class _Line:
    number: int
    text: str
    stem: str
    found: list[int] = field(default_factory=list)


_SHARD = re.compile(r", (.*) at byte \d+$")  # as `Shards.name` has it


def _stem(name: str) -> str:
    """A path without the suffix of an image file, in forward slashes."""
    known = _SHARD.search(name)
    root, suffix = os.path.splitext((known[1] if known else name).replace(os.sep, "/"))
    return root if re.fullmatch(r"\.[A-Za-z]{3,4}", suffix) else root + suffix


def read_list(path: Path, source: Source) -> np.ndarray:
    """The images that a list file names, one a line, as ImageNet's `1percent.txt`: ascending indices in `source`.

    A line is a file's name (`n01440764_10026.JPEG`) or a path below the folder of images; suffixes do not matter, since
    shards may have others. Raises UserError for a file that cannot be read, for names that are unknown, of two images,
    or there twice.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"--list {path} cannot be read ({why}): give a text file with the name of an image a line."
                        ) from error  # fmt: skip
    lines = [_Line(i, text.strip(), _stem(text.strip())) for i, text in enumerate(texts, 1) if text.strip()]
    if not lines:
        raise UserError(f"--list {path} is empty: give a text file with the name of an image a line.")
    wanted: dict[str, list[_Line]] = {}
    for line in lines:
        wanted.setdefault(line.stem.rpartition("/")[2], []).append(line)
    for i in range(len(source)):
        stem = _stem(original_name(source, i))
        for line in wanted.get(stem.rpartition("/")[2], ()):
            if f"/{stem}".endswith(f"/{line.stem.removeprefix('./')}"):
                line.found.append(i)
    unknown = [line for line in lines if not line.found]
    if unknown:
        raise UserError(
            f"--list {path}: {len(unknown)} of {len(lines)} names are not among the training images (first in line "
            f"{unknown[0].number}: {unknown[0].text}): give the list of this data set, or another data.path."
        )
    double = next((line for line in lines if len(line.found) > 1), None)
    if double:
        raise UserError(
            f"--list {path}, line {double.number}: {double.text} names {len(double.found)} images: write the path from "
            "the folder of the classes."
        )
    indices = np.array([line.found[0] for line in lines])
    if len(np.unique(indices)) < len(indices):
        seen: set[int] = set()
        again = next(line for line in lines if line.found[0] in seen or seen.add(line.found[0]))
        raise UserError(f"--list {path}, line {again.number}: {again.text} is there twice: take it out once.")
    return np.sort(indices)


def without_images(labels: np.ndarray, classes: Sequence[str]) -> str | None:
    """A sentence on classes of which `labels` holds no image; None where there are none."""
    missing = np.setdiff1d(np.arange(len(classes)), labels)
    if not len(missing):
        return None
    return (
        f"{len(missing)} of {len(classes)} classes have no labelled image (first {classes[int(missing[0])]}), so that "
        "their images count as wrong."
    )
