"""The probes measure what they say, on features with a known answer."""

import numpy as np
import pytest
import torch

from elsewhere.data.sources import open_source
from elsewhere.launch.build import build_method
from elsewhere.launch.config import Probe, load_config
from elsewhere.launch.engine.ddp import DdpEngine
from elsewhere.launch.engine.precision import LossScaler
from elsewhere.launch.optim import make_optimizer
from elsewhere.launch.quality import features, few_labels, knn_accuracy, linear_accuracy, probe
from elsewhere.launch.world import World


@pytest.fixture
def engine(tiny):
    method = build_method(load_config("demo", tiny))
    return DdpEngine(method, make_optimizer(method), World(), LossScaler(False))


@pytest.fixture
def clusters():
    """Two classes apart along one of eight directions, on top of a common mean a thousand times as large."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    points = rng.normal(size=(400, 8))
    points[:, 0] += 6 * labels
    return (1000 + points).astype(np.float32), labels


@pytest.mark.parametrize("accuracy", [lambda *a: knn_accuracy(*a, 20), linear_accuracy])
def test_separable_classes_are_found_and_shuffled_labels_are_not(accuracy, clusters):
    points, labels = clusters
    assert accuracy(points[:300], labels[:300], points[300:], labels[300:]) > 0.95
    shuffled = np.random.default_rng(1).permutation(labels[:300])
    assert accuracy(points[:300], shuffled, points[300:], labels[300:]) < 0.75


def test_knn_is_the_weighted_vote_written_out(clusters):
    points, labels = clusters
    train, val = points[:300].astype(np.float64), points[300:].astype(np.float64)
    mean, std = train.mean(0), train.std(0)
    unit = [((x - mean) / std) / np.linalg.norm((x - mean) / std, axis=1, keepdims=True) for x in (train, val)]
    cosine = unit[1] @ unit[0].T
    votes = np.zeros((100, 2))
    for i, row in enumerate(cosine):
        for j in np.argsort(-row)[:5]:
            votes[i, labels[j]] += np.exp((row[j] - 1) / 0.07)
    expected = np.mean(votes.argmax(1) == labels[300:])
    assert knn_accuracy(points[:300], labels[:300], points[300:], labels[300:], 5) == pytest.approx(expected, abs=0.011)


def test_few_labels_takes_as_many_of_each_class():
    labels = np.array([0] * 50 + [1] * 7 + [2] * 3)
    chosen = few_labels(labels, 5, seed=0, draw=0)
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 3]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) != set(few_labels(labels, 5, seed=0, draw=1))


def test_features_are_mean_teacher_tokens_in_the_order_asked_for(engine):
    method, source = engine.method, open_source("digits", "val", 1)
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.zero_()  # only the teacher may be used
    indices = np.array([5, 300, 2])
    found, labels = features(engine, source, indices, "bilinear", workers=0, batch=2)
    images = torch.stack([torch.from_numpy(source.read(int(i)).copy()).permute(2, 0, 1) for i in indices])
    with torch.no_grad():
        expected = method.teacher(method.normalise(images)).mean(dim=1).numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert labels.tolist() == [source.label(int(i)) for i in indices]


def test_features_keep_their_order_over_ranks(engine):
    """Another order would give other few labels, and other figures, on another number of ranks."""
    source, shares = open_source("digits", "val", 1), []

    class Collecting(World):
        def gather_host(self, value):
            shares.append(value)
            return shares

    indices = np.arange(0, 70, 3)
    expected, truth = features(engine, source, indices, "bilinear", workers=0)
    for rank in (1, 0):
        engine.world = Collecting(rank, 2)
        found, labels = features(engine, source, indices, "bilinear", workers=0)
    assert np.abs(found - expected).max() < 1e-5
    assert labels.tolist() == truth.tolist()


@pytest.mark.parametrize("count", [1, 5, 8, 9])
def test_every_rank_takes_as_many_forward_passes(count, engine, monkeypatch):
    """Engines that divide weights gather them in a pass: a rank with fewer images would leave the others waiting."""

    class Alone(World):
        def gather_host(self, value):
            return [value]

    passes = []
    observe = engine.method.observe
    monkeypatch.setattr(engine.method, "observe", lambda images: passes.append(engine.world.rank) or observe(images))
    for rank in range(4):
        engine.world = Alone(rank, 4)
        features(engine, open_source("digits", "val", 1), np.arange(count), "bilinear", workers=0, batch=2)
    expected = {1: 1, 5: 1, 8: 1, 9: 2}[count]
    assert [passes.count(rank) for rank in range(4)] == [expected] * 4


def test_unlabelled_images_give_no_probe(engine):
    from elsewhere.data.images import TorchDataset

    source = TorchDataset(torch.zeros(40, 1, 8, 8), 1)
    assert probe(engine, source, source, Probe(), "bilinear", 0, 0) is None


def test_a_probe_leaves_the_method_as_it_was(engine):
    method = engine.method
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    sources = open_source("digits", "train", 1), open_source("digits", "val", 1)
    found = probe(engine, *sources, Probe(labels_per_class=3, draws=2), "bilinear", 0, 0)
    assert found and found["labels_per_class"] == 3 and 0 <= found["linear"] <= 1
    assert method.training
    assert all(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())
