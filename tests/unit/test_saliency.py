"""The subject of a picture from features: planted ones, the eigenproblem against another solver, refusals."""

import math

import numpy as np
import pytest
import torch
from semantic_style.regions.saliency import WEAK, _affinity, _cut, _otsu, compactness, find_subject


def planted(size=(16, 20), subject=(slice(6, 11), slice(8, 13)), channels=12, noise=0.02, seed=0):
    """Sky over ground with something before both: a direction of its own for each, and the subject's true mask."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(channels, 3, generator=g, dtype=torch.float64)).Q.T
    labels = torch.zeros(size, dtype=torch.long)
    labels[size[0] // 2 :] = 1
    labels[subject] = 2
    features = directions[labels].movedim(-1, 0)
    return features + noise * torch.randn(features.shape, generator=g, dtype=torch.float64), labels == 2


@pytest.mark.parametrize("seed", range(4))
def test_the_thing_before_sky_and_ground_is_found(seed):
    features, truth = planted(seed=seed)
    found = find_subject(features)
    assert torch.equal(found.hard, truth)
    assert found.contact == 0
    assert not found.touching
    assert found.cuts == 2  # the first parts sky from the ground
    assert found.area == pytest.approx(25 / 320)
    assert found.soft.min() >= 0
    assert found.soft.max() <= 1
    assert (found.soft[truth] > 0.5).all()
    assert (found.soft[~truth] < 0.5).all()


def test_before_one_background_one_cut_is_enough():
    features, truth = planted()
    one = torch.where(truth, features, features[:, :1, :1])
    found = find_subject(one)
    assert torch.equal(found.hard, truth)
    assert found.cuts == 1


def test_what_touches_one_border_is_a_subject_what_reaches_across_is_not():
    features, truth = planted(subject=(slice(10, 16), slice(8, 10)))
    found = find_subject(features, max_side=32)
    assert found.hard[truth].all()
    across, _ = planted(subject=(slice(7, 9), slice(0, 20)))
    found = find_subject(across)
    assert found.touching
    assert found.contact > 0


def test_the_cut_is_the_generalised_eigenproblem_s():
    """`(D - W) y = lambda D y`, as Shi and Malik state it, by another solver."""
    features, _ = planted((7, 6), (slice(2, 5), slice(2, 4)), noise=0.4)
    w = _affinity(features, 0.3)
    part = torch.arange(42) % 5 != 0
    value, (side, other) = _cut(w, part, (7, 6))
    sub = w[part][:, part].numpy()
    d = np.diag(sub.sum(1))
    values, vectors = np.linalg.eig(np.linalg.inv(d) @ (d - sub))
    second = values.real.argsort()[1]
    assert value == pytest.approx(values[second].real, abs=1e-10)
    # The length is free, and the threshold is taken off.
    y, mine = vectors[:, second].real, side.vector[part].numpy()
    assert abs(np.corrcoef(y, mine)[0, 1]) == pytest.approx(1, abs=1e-9)
    assert torch.equal(side.positions | other.positions, part)
    assert not (side.positions & other.positions).any()
    assert torch.isnan(side.vector[~part]).all()


def test_compactness_of_known_shapes():
    def bar(h, w):
        part = torch.zeros(40, 40, dtype=torch.bool)
        part[5 : 5 + h, 3 : 3 + w] = True
        return part

    for h, w in ((1, 1), (6, 6), (4, 20), (30, 2)):
        # The variance of a continuous interval of length n is n^2 / 12.
        assert compactness(bar(h, w)) == pytest.approx(h * w / (2 * math.pi * (h * h + w * w) / 12))
    y, x = torch.meshgrid(torch.arange(40) - 19.5, torch.arange(40) - 19.5, indexing="ij")
    assert compactness(torch.hypot(y, x) < 15) == pytest.approx(1, abs=0.01)
    two = bar(6, 6) | bar(6, 6).roll(25, 1)
    assert compactness(two) < 0.2
    assert compactness(torch.zeros(4, 4, dtype=torch.bool)) == 0


def test_affinity_by_hand():
    features, _ = planted((4, 5), (slice(1, 3), slice(2, 4)), noise=0.3)
    w = _affinity(features, 0.2)
    rows = features.flatten(1).T - features.flatten(1).mean(1)
    for i in range(20):
        for j in range(20):
            cosine = rows[i] @ rows[j] / math.sqrt(rows[i] @ rows[i]) / math.sqrt(rows[j] @ rows[j])
            assert w[i, j] == pytest.approx(1.0 if cosine > 0.2 else WEAK)


def test_a_search_ends_when_told():
    features, _ = planted()

    def end():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_subject(features, check=end)
    asked = []
    assert find_subject(features, check=lambda: asked.append(1)).cuts <= len(asked)


def test_otsu_against_all_thresholds():
    v = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = _otsu(v)

    def within(threshold):
        groups = v[v > threshold], v[v <= threshold]
        return sum(((g - g.mean()) ** 2).sum() for g in groups).item()

    others = v.sort().values
    assert within(t) == pytest.approx(min(within(x) for x in others[:-1]), abs=1e-12)


def test_deterministic_and_blind_to_scale_and_sign():
    features, _ = planted(noise=0.3)
    a, b, c = find_subject(features), find_subject(features), find_subject(-3 * features)
    assert torch.equal(a.soft, b.soft)
    assert torch.equal(a.hard, c.hard)


@pytest.mark.parametrize(("size", "dtype"), [((48, 64), torch.float32), ((33, 21), torch.float16), ((8, 30), None)])
def test_any_grid_and_type(size, dtype):
    h, w = size
    where = (slice(h // 3, 2 * h // 3), slice(w // 3, w // 2))
    features, truth = planted(size, where)
    found = find_subject(features.to(dtype or torch.float64))
    assert found.hard.shape == found.soft.shape == size
    assert (found.hard & truth).sum() / (found.hard | truth).sum() > 0.6


@pytest.mark.parametrize(
    ("features", "threshold", "message"),
    [
        (torch.zeros(1, 3, 8, 8), 0.5, r"got \[1, 3, 8, 8\]"),
        (torch.zeros(3, 3, 8), 0.5, "4x4 positions or more"),
        (torch.full((3, 8, 8), torch.nan), 0.5, "NaN"),
        (torch.ones(3, 8, 8), 0.5, "same everywhere"),
        (torch.zeros(3, 8, 8), 0.5, "same everywhere"),
        (torch.rand(3, 8, 8), 1.0, "below 1, got 1.0"),
        (torch.rand(3, 8, 8), float("nan"), "got nan"),
    ],
)
def test_refusals(features, threshold, message):
    with pytest.raises(ValueError, match=message):
        find_subject(features, threshold)
