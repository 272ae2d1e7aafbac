"""The classifiers that probe features, each against another way to the same answer."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F

from elsewhere.launch.errors import UserError
from elsewhere.launch.evaluate import low_shot
from elsewhere.launch.evaluate.attentive import AttentiveProbes
from elsewhere.launch.evaluate.intervals import wilson
from elsewhere.launch.evaluate.linear import Heads, Setting, decay, epoch_batches, settings, train_epoch
from elsewhere.launch.evaluate.low_shot import Shots, inverse_strength
from elsewhere.launch.evaluate.nearest import Nearest, statistics
from elsewhere.launch.evaluate.scores import counts, over_draws
from elsewhere.models.attentive_pool import AttentivePool


@pytest.fixture
def clusters():
    """Function of classes, images and width: features around a centre for each class, on a large common mean."""

    def make(classes, n, width, seed=0):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(n) % classes)
        centres = np.random.default_rng(99).normal(size=(classes, width))
        return (5 + centres[labels] + rng.normal(size=(n, width))).astype(np.float32), labels.astype(np.int64)

    return make


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 10), (10, 10), (912, 2000), (1, 3)])
def test_the_interval_is_wilsons(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_counts_are_those_of_topk():
    scores = torch.randn(3, 200, 9, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(200) % 9
    for found, one in zip(counts(scores, truth), scores, strict=True):
        top = one.topk(5).indices
        assert found.tolist() == [int((top[:, 0] == truth).sum()), int((top == truth[:, None]).any(1).sum())]


def test_of_equal_scores_the_first_class_is_the_answer_and_not_a_number_is_none():
    scores = torch.tensor([[[1.0, 1, 0, 0, 0, 0]] * 2 + [[float("nan")] * 6]])
    assert counts(scores, torch.tensor([0, 1, 0]))[0].tolist() == [1, 2]


def test_draws_give_mean_and_deviation():
    row = over_draws([{"top1": 0.2, "top5": 0.6}, {"top1": 0.4, "top5": 0.8}], setting="x")
    assert row == {"setting": "x", "top1": 0.3, "std": pytest.approx(0.14142, abs=1e-5), "draws": [0.2, 0.4],
                   "top5": 0.7}  # fmt: skip


def test_statistics_are_numpys_and_a_constant_feature_is_left_alone():
    features = np.random.default_rng(0).normal(1000, 2, (40000, 5)).astype(np.float32)
    features[:, 2] = 7.25
    mean, std = statistics(features)
    expected = features.astype(np.float64).std(axis=0)
    expected[2] = 1
    assert np.allclose(mean, features.mean(axis=0, dtype=np.float64), rtol=1e-6)
    assert np.allclose(std, expected, rtol=1e-5)


def test_votes_over_blocks_are_those_of_sklearn(clusters):
    (train, labels), (val, truth) = clusters(7, 900, 16), clusters(7, 700, 16, seed=1)
    known = Nearest(train, labels)
    mean, std = train.mean(0, dtype=np.float64), train.astype(np.float64).std(0)
    for k, votes in zip((10, 200), known.votes(val, [10, 200]), strict=True):
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07)).fit(
            (train - mean) / std, labels
        )
        share = model.predict_proba((val - mean) / std)
        assert np.allclose(votes / votes.sum(1, keepdim=True), share, atol=1e-4)
        assert (votes.argmax(1).numpy() == model.predict((val - mean) / std)).mean() > 0.998
    assert counts(known.votes(val, [20]), torch.from_numpy(truth))[0, 0] > 600


def test_more_neighbours_than_images_are_all_images(clusters):
    train, labels = clusters(3, 30, 4)
    votes = Nearest(train, labels).votes(train, [50])
    assert votes.shape == (1, 30, 3) and bool((votes > 0).all())


# Linear


def test_heads_trained_at_once_are_those_trained_alone_by_torch(clusters):
    features, labels = clusters(5, 96, 12)
    chosen = settings((0.01, 0.3), (0.0, 5e-4))
    heads = Heads(12, 5, chosen, "cpu", seed=3)
    alone = []
    for i, one in enumerate(chosen):
        model = nn.Sequential(nn.BatchNorm1d(12, affine=False), nn.Linear(12, 5))
        model[1].weight.data.copy_(heads.weight[i])
        nn.init.zeros_(model[1].bias)
        alone.append(
            (model, torch.optim.SGD(model.parameters(), one.lr, 0.9, nesterov=True, weight_decay=one.weight_decay))
        )
    for step in range(12):
        rows = torch.arange(32) + 32 * (step % 3)
        part, truth = torch.from_numpy(features)[rows], torch.from_numpy(labels)[rows]
        heads.step(part, truth)
        for model, optimizer in alone:
            optimizer.zero_grad()
            F.cross_entropy(model(part), truth).backward()
            optimizer.step()
    scores = heads.scores(torch.from_numpy(features))
    for found, (model, _) in zip(scores, alone, strict=True):
        assert (found - model.eval()(torch.from_numpy(features))).abs().max() < 1e-5


def test_rates_fall_tenfold_where_vissl_has_them():
    assert [round(-np.log10(decay(epoch, 28))) for epoch in (0, 7, 8, 15, 16, 23, 24, 27)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("count", [2, 255, 256, 257, 513, 600])
def test_an_epoch_has_every_row_once_and_no_batch_of_one(count):
    batches = list(epoch_batches(count, 0, 1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert min(map(len, batches)) > 1


def test_a_rate_grows_with_the_batch(clusters):
    features, labels = clusters(3, 64, 6)
    one, other = (Heads(6, 3, [Setting(rate, 0.0)], "cpu") for rate in (0.1, 0.025))
    train_epoch(one, features, labels, 0, 0, 28, batch=64)
    other.step(*(torch.from_numpy(x[next(epoch_batches(64, 0, 0))]) for x in (features, labels)))
    assert (one.weight - other.weight).abs().max() < 1e-6


# Attentive


def test_attentive_pool_is_torchs_attention_with_one_query():
    torch.manual_seed(0)
    pool = AttentivePool(12, 3, 4)
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    attention.in_proj_weight.data = torch.cat([pool.q.weight, pool.kv.weight]).detach()
    attention.in_proj_bias.data = torch.cat([pool.q.bias, pool.kv.bias]).detach()
    attention.out_proj.load_state_dict(pool.proj.state_dict())
    tokens = torch.randn(5, 9, 12)
    query = pool.query.expand(5, -1, -1)
    expected = query + attention(query, pool.norm1(tokens), pool.norm1(tokens), need_weights=False)[0]
    assert (pool.pool(tokens) - expected[:, 0]).abs().max() < 1e-5


def test_attentive_probes_find_a_class_that_one_token_shows():
    """The mean over tokens hides it among noise; attention has to look at the token that says so."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    tokens = rng.normal(size=(600, 16, 8)).astype(np.float32)
    where = rng.integers(0, 16, 600)
    tokens[np.arange(600), where, 0] = 6
    tokens[np.arange(600), where, 1] = 4 * (2 * labels - 1)
    probes = AttentiveProbes(8, 2, 2, [1e-2], "cpu")
    probes.fit(tokens[:400], labels[:400], epochs=60)
    right = counts(probes.scores(torch.from_numpy(tokens[400:])), torch.from_numpy(labels[400:]))[0, 0]
    assert right > 180


def test_attentive_rates_do_not_touch_each_other():
    rng = np.random.default_rng(0)
    tokens, labels = rng.normal(size=(64, 4, 8)).astype(np.float32), rng.integers(0, 3, 64)
    together, alone = AttentiveProbes(8, 2, 3, [1e-3, 1e-2], "cpu"), AttentiveProbes(8, 2, 3, [1e-2], "cpu")
    for probes in (together, alone):
        probes.fit(tokens, labels, epochs=2)
    found = together.scores(torch.from_numpy(tokens))[1] - alone.scores(torch.from_numpy(tokens))[0]
    assert found.abs().max() < 1e-5


# Low-shot


def released_objective(features, labels, classes, strength):
    """The minimiser `[classes, D]` of mean loss + λ / (2 N) ‖W‖², by torch's L-BFGS in float64."""
    inputs, truth = torch.from_numpy(features).double(), torch.from_numpy(labels)
    weights = torch.zeros(classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=5000, tolerance_grad=1e-12, tolerance_change=1e-16,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(inputs @ weights.T, truth) + strength / (2 * len(truth)) * weights.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weights.detach().numpy()


@pytest.mark.parametrize("classes", [2, 4])
def test_the_map_to_scikit_learns_c_solves_the_released_objective(classes, clusters):
    features, labels = clusters(classes, 60, 6)
    strength = 0.5
    fitted = low_shot.fit(features, labels, classes, strength, epochs=2000)
    assert fitted.converged
    mean, std = features.mean(0, dtype=np.float64), features.astype(np.float64).std(0, ddof=1)
    expected = released_objective((features - mean) / std, labels, classes, strength)
    found = fitted.weights @ fitted.rotation.T
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_c_does_not_depend_on_the_number_of_images():
    assert inverse_strength(0.0025, 1000) == pytest.approx(400)
    assert inverse_strength(0.0025, 2) == pytest.approx(800)


def test_fewer_images_than_features_are_solved_in_their_span(clusters):
    """Leaving out what does not vary changes no score."""
    (features, labels), (val, _) = clusters(3, 20, 50), clusters(3, 10, 50, seed=1)
    fitted = low_shot.fit(features, labels, 3, 0.5, epochs=2000)
    mean, std = features.mean(0, dtype=np.float64), features.astype(np.float64).std(0, ddof=1)
    weights = released_objective((features - mean) / std, labels, 3, 0.5)
    assert fitted.rotation.shape == (50, 19)
    assert np.abs(fitted.scores(val) - (val - mean) / std @ weights.T).max() < 1e-3


def test_test_features_are_standardised_by_training_statistics(clusters):
    """The released code used their own, so that one image alone had no score."""
    (features, labels), (val, _) = clusters(3, 60, 6), clusters(3, 10, 6, seed=1)
    fitted = low_shot.fit(features, labels, 3)
    assert np.allclose(fitted.scores(val)[4:5], fitted.scores(val[4:5]), atol=1e-9)


def test_a_class_without_images_is_never_the_answer(clusters):
    features, labels = clusters(2, 40, 6)
    scores = low_shot.fit(features, 3 * labels, 5).scores(features)
    assert set(scores.argmax(1)) == {0, 3}
    assert ((scores.argmax(1) == 3 * labels).mean()) > 0.85


def test_shares_and_numbers_are_drawn_from_each_class():
    labels = np.repeat([0, 1, 2], [400, 149, 3])
    drawn = Shots("1%").draw(labels, 0, 0)
    assert np.bincount(labels[drawn]).tolist() == [4, 1, 1]
    assert np.bincount(labels[Shots("5").draw(labels, 0, 0)]).tolist() == [5, 5, 3]
    assert set(drawn) != set(Shots("1%").draw(labels, 0, 1))


@pytest.mark.parametrize("text", ["0", "0%", "1.5", "-3", "many", "%"])
def test_what_is_no_number_of_shots_is_refused(text):
    with pytest.raises(UserError, match=f"--shots {text}"):
        Shots(text)
