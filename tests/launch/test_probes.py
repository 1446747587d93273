"""Probes of frozen features are scikit-learn's."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from launch.embedding.probes import linear_probe, logistic_regression, nearest_neighbours


def features(samples, classes=4, width=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples)
    centres = np.random.default_rng(9).normal(size=(classes, width))
    return (centres[labels] + 1.5 * rng.normal(size=(samples, width))).astype(np.float32), labels


def test_nearest_neighbours_are_those_of_sklearn():
    (bank, labels), (queries, _) = features(120), features(50, seed=1)
    votes = nearest_neighbours(*map(torch.from_numpy, (bank, labels, queries)), 4, 7, 0.1)
    peer = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1))
    expected = peer.fit(bank, labels).predict_proba(queries)
    np.testing.assert_allclose(votes.exp().numpy(), expected, rtol=1e-3, atol=1e-6)


def test_logistic_regression_is_that_of_sklearn():
    x, labels = features(200)
    weight, bias = logistic_regression(torch.from_numpy(x), torch.from_numpy(labels), 4, 0.05)
    peer = LogisticRegression(C=1 / (0.05 * len(x)), tol=1e-8, max_iter=5000).fit(x, labels)
    logits = x @ weight.numpy().T + bias.numpy()
    expected = x @ peer.coef_.T + peer.intercept_
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=5e-3
    )


def test_the_probe_chooses_a_penalty_that_serves():
    (bank, labels), (queries, targets) = features(120), features(400, seed=1)
    arguments = [*map(torch.from_numpy, (bank, labels, queries)), 4]
    scores, penalty = linear_probe(*arguments, [1e-6, 1e-1])
    hits = (scores.argmax(1).numpy() == targets).mean()
    alone = {p: (linear_probe(*arguments, [p])[0].argmax(1).numpy() == targets).mean() for p in (1e-6, 1e-1)}
    assert hits == alone[penalty] > 0.6
