"""Classifiers in closed form on the features of an encoder, in float64, so that equal features give equal classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

#: Number of neighbours and temperature of their votes in DINO's protocol (arXiv 2104.14294, section 4.1).
NEIGHBOURS, TEMPERATURE = 20, 0.07

#: Part of the mean variance that is added to each variance before whitening, and the other's rest.
SHRINKAGE = 0.05

#: Ridge penalty in units of the features' mean variance.
PENALTY = 0.1

_EPSILON = 1e-20  # least variance; equal features have none


def nearest_neighbours(train: Tensor, labels: Tensor, features: Tensor, classes: int) -> Tensor:
    """Return the class that the nearest training images vote for, N.

    A vote of a neighbour with cosine similarity s counts exp(s / `TEMPERATURE`).

    Args:
        train: features of the training images, M×C.
        labels: their classes, M.
        features: features to classify, N×C.
        classes: number of classes.
    """
    similarity, nearest = (F.normalize(features) @ F.normalize(train).T).topk(min(NEIGHBOURS, len(train)))
    votes = torch.zeros(len(features), classes, dtype=similarity.dtype, device=similarity.device)
    votes.scatter_add_(1, labels[nearest], ((similarity - 1) / TEMPERATURE).exp())
    return votes.argmax(1)


def prototypes(train: Tensor, labels: Tensor, features: Tensor, classes: int) -> Tensor:
    """Return the class of the nearest prototype by cosine, N: the mean of a class's whitened features.

    Whitening takes the covariance of all training features, shrunk towards a sphere by `SHRINKAGE`.

    Args:
        train: features of the training images, M×C.
        labels: their classes, M.
        features: features to classify, N×C.
        classes: number of classes; one without training images is never returned.
    """
    mean = train.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(train.T, correction=0))
    variances = variances.clamp(min=_EPSILON).lerp(variances.mean(), SHRINKAGE)
    whitening = axes * variances.rsqrt()
    one_hot = F.one_hot(labels, classes).to(train)
    means = one_hot.T @ ((train - mean) @ whitening)  # sums, which have the means' directions
    scores: Tensor = ((features - mean) @ whitening) @ F.normalize(means).T
    return scores.masked_fill(one_hot.sum(0) == 0, -torch.inf).argmax(1)


def ridge(train: Tensor, labels: Tensor, features: Tensor, classes: int) -> Tensor:
    """Return the class with the highest output of a ridge regression from normalized features to one-hot labels, N.

    Args:
        train: features of the training images, M×C.
        labels: their classes, M.
        features: features to classify, N×C.
        classes: number of classes.
    """
    train, features = F.normalize(train), F.normalize(features)
    mean = train.mean(0)
    centred, targets = train - mean, F.one_hot(labels, classes).to(train)
    gram = centred.T @ centred
    penalty = (PENALTY * gram.trace() / len(gram)).clamp(min=_EPSILON) * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )
    weight = torch.linalg.solve(gram + penalty, centred.T @ (targets - targets.mean(0)))
    scores: Tensor = (features - mean) @ weight + targets.mean(0)
    return scores.argmax(1)


#: Heads by the name that ``--head`` takes.
HEADS: Mapping[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "knn": nearest_neighbours,
    "prototypes": prototypes,
    "ridge": ridge,
}
