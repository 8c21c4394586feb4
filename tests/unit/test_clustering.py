"""Joint clustering of features, each part against loops or an exact answer; the measures of agreement."""

import itertools

import pytest
import torch
from semantic_style.benchmarks.agreement import adjusted_rand_index, agreement
from semantic_style.regions import clustering
from semantic_style.regions.clustering import (
    MAX_PLACES,
    SMALL,
    alike_averaged,
    cluster,
    joint_vectors,
    kmeans,
    nearest,
    shared_labels,
    silhouette,
    smoothed,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(labels, spread=0.2, offset=0.0, seed=0, channels=16):
    """Features [B, channels, h, w]: a direction for each label of [B, h, w], noise, and an offset that all share."""
    directions = 3 * random(int(labels.max()) + 1, channels, seed=99)
    noise = spread * random(*labels.shape, channels, seed=seed)
    return (directions[labels] + noise + offset * random(channels, seed=seed + 7)).movedim(-1, 1).float()


CONTENT = torch.tensor([[0] * 12, [0] * 12, [0] * 12, [1] * 12, [1] * 12, [1] * 6 + [2] * 6, [2] * 12, [2] * 12])[None]
STYLE = CONTENT.roll(4, 2).flip(1)[:, :, :10]


# The measures.


def pair_counting(a, b):
    """Hubert and Arabie's index by going through all pairs of places."""
    a, b = a.flatten().tolist(), b.flatten().tolist()
    pairs = list(itertools.combinations(range(len(a)), 2))
    in_a = [a[i] == a[j] for i, j in pairs]
    in_b = [b[i] == b[j] for i, j in pairs]
    both = sum(x and y for x, y in zip(in_a, in_b, strict=True))
    chance = sum(in_a) * sum(in_b) / len(pairs)
    return (both - chance) / ((sum(in_a) + sum(in_b)) / 2 - chance)


@pytest.mark.parametrize("seed", range(4))
def test_rand_index_is_that_of_all_pairs(seed):
    a, b = integers(4, 6, 5, seed=seed), integers(3, 6, 5, seed=seed + 10)
    assert adjusted_rand_index(a, b) == pytest.approx(pair_counting(a, b), abs=1e-12)
    # The names of the labels do not matter, nor do gaps between them.
    assert adjusted_rand_index(a, 7 - 2 * a) == 1.0
    assert adjusted_rand_index(a, torch.zeros_like(a)) == 0.0


def test_rand_index_of_trivial_divisions():
    one, each = torch.zeros(5, dtype=torch.long), torch.arange(5)
    assert adjusted_rand_index(one, one) == 1.0
    assert adjusted_rand_index(each, each) == 1.0
    assert adjusted_rand_index(one[:1], each[:1]) == 1.0
    with pytest.raises(ValueError, match=r"\[5\] and \[4\]"):
        adjusted_rand_index(one, each[:4])


def test_agreement_of_small_maps():
    true_c, true_s = torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.tensor([[0, 1, 1, 1]])
    perfect = agreement(true_c, true_s, true_c, true_s)
    assert perfect == {"content": 1, "style": 1, "joint": 1, "same region": 1, "right partner": 1, "regions": 3}
    # 0 is found; of content's 1 half is called 0; region 2 is not in the style, so nothing is asked of it.
    found = agreement(torch.tensor([[5, 5, 5, 7, 9, 9]]), torch.tensor([[5, 7, 7, 5]]), true_c, true_s)
    # Places: two of region 0 see style {0, 3}: half right. One of region 1 sees the same, half right; one sees {1, 2}.
    assert found["right partner"] == pytest.approx((2 * 0.5 + 1 * 0.5 + 1 * 1.0) / 4)
    one = torch.zeros_like(true_s)
    blind = agreement(torch.zeros_like(true_c), one, true_c, true_s)
    assert blind["right partner"] == pytest.approx((2 * 0.25 + 2 * 0.75) / 4)
    # A label that the style lacks sees all of it.
    assert agreement(torch.ones_like(true_c), one, true_c, true_s)["right partner"] == blind["right partner"]


# The parts.


def test_kmeans_finds_the_best_division_of_few_places():
    places = random(8, 2, seed=3)

    def loss(labels):
        return sum(((p := places[labels == j]) - p.mean(0)).square().sum() for j in labels.unique())

    best = min(loss(torch.tensor(labels)).item() for labels in itertools.product(range(3), repeat=8))
    found = min(loss(nearest(places, kmeans(places, 3, seeded(s)))).item() for s in range(5))
    assert found == pytest.approx(best, rel=1e-12)


def test_kmeans_with_fewer_different_places_than_centres():
    places = random(2, 3).repeat(5, 1)
    centres = kmeans(places, 4, seeded())
    assert centres.shape == (4, 3)
    torch.testing.assert_close(centres[nearest(places, centres)], places)


def test_silhouette_is_that_of_the_paper():
    places, labels = random(14, 3), integers(3, 14, seed=5)
    labels[0] = 8  # the only one of its cluster
    values = []
    for i in range(14):
        means = {}
        for cluster_of in labels.unique().tolist():
            others = [j for j in range(14) if labels[j] == cluster_of and j != i]
            if others:
                means[cluster_of] = sum((places[i] - places[j]).norm().item() for j in others) / len(others)
        own = means.pop(int(labels[i]), None)
        nearest_other = min(means.values())
        values.append(0.0 if own is None else (nearest_other - own) / max(nearest_other, own))
    assert silhouette(places, labels) == pytest.approx(sum(values) / 14, rel=1e-9)
    assert silhouette(places, torch.zeros_like(labels)) == -1.0


def test_averaging_over_what_looks_alike_by_loops():
    h, w = 3, 5
    values, guide = random(2, 2, h, w), random(2, 4, h, w, seed=1)
    expected = values.clone()
    places = list(itertools.product(range(h), range(w)))
    for b, (y, x) in itertools.product(range(2), places):
        total = torch.zeros(2, dtype=torch.float64)
        weights = 0.0
        for v, u in places:
            cosine = torch.cosine_similarity(guide[b, :, y, x], guide[b, :, v, u], dim=0).clamp_min(0)
            far = ((y - v) / h) ** 2 + ((x - u) / w) ** 2
            weight = cosine**clustering.ALIKE * torch.tensor(-far / (2 * clustering.NEAR**2)).exp()
            total, weights = total + weight * values[b, :, v, u], weights + weight
        expected[b, :, y, x] = total / weights
    torch.testing.assert_close(alike_averaged(values, guide), expected, rtol=1e-6, atol=1e-8)


def test_places_without_a_look_keep_their_value():
    values = random(1, 2, 4, 4)
    torch.testing.assert_close(alike_averaged(values, torch.zeros(1, 3, 4, 4, dtype=torch.float64)), values)


def test_smoothing_is_a_majority_of_nine():
    labels = integers(3, 2, 6, 7, seed=4)
    padded = torch.nn.functional.pad(labels[:, None].double(), [1] * 4, mode="replicate")[:, 0].long()
    expected = labels.clone()
    for b, y, x in itertools.product(range(2), range(6), range(7)):
        votes = torch.bincount(padded[b, y : y + 3, x : x + 3].flatten(), minlength=3).double()
        votes[labels[b, y, x]] += 0.5
        expected[b, y, x] = votes.argmax()
    assert torch.equal(smoothed(labels, 1, 3), expected)
    assert torch.equal(smoothed(labels, 2, 3), smoothed(expected, 1, 3))
    assert torch.equal(smoothed(labels, 0, 3), labels)


def test_vectors_are_centred_unit_features_on_the_finest_grid():
    coarse, fine = random(2, 3, 4, 3), random(2, 5, 8, 6, seed=1)
    vectors, guide = joint_vectors([coarse, fine])
    assert vectors.shape == (2, 8, 8, 6)
    unit = fine / fine.norm(dim=1, keepdim=True)
    torch.testing.assert_close(guide, unit - unit.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(vectors[:, 3:], guide)
    torch.testing.assert_close(vectors.mean(dim=(2, 3)), torch.zeros(2, 8, dtype=torch.float64))
    assert vectors[:, :3].std() > 0
    # A picture's brightness in the features' units says nothing.
    torch.testing.assert_close(joint_vectors([7 * coarse, 3 * fine])[0], vectors)


def test_large_grids_are_averaged_down_in_their_shape():
    vectors, _ = joint_vectors([random(1, 2, 20, 40).half(), random(1, 2, 80, 160)])
    h, w = vectors.shape[2:]
    assert h * w <= MAX_PLACES * 1.02
    assert abs(w / h - 2) < 0.05


# The whole.


def found(labels_of_content, labels_of_style, **settings):
    sides = [
        joint_vectors([blobs(labels, offset=offset, seed=seed)])
        for labels, offset, seed in ((labels_of_content, 0.0, 1), (labels_of_style, 4.0, 2))
    ]
    return cluster(*sides, **settings)


@pytest.fixture
def plain(monkeypatch):
    """Without what blurs maps as small as those here."""
    monkeypatch.setattr(clustering, "NEAR", 0.05)


def test_shared_regions_of_images_of_different_sizes_and_styles(plain):
    clustering_ = found(CONTENT, STYLE, regions=3, smoothing=0)
    assert clustering_.regions.content.shape == CONTENT.shape
    assert clustering_.regions.style.shape == STYLE.shape
    both = torch.cat([clustering_.regions.content.flatten(), clustering_.regions.style.flatten()])
    assert adjusted_rand_index(both, torch.cat([CONTENT.flatten(), STYLE.flatten()])) > 0.95
    assert clustering_.silhouettes == {}
    # The largest first.
    counts = both.bincount().tolist()
    assert counts == sorted(counts, reverse=True)
    areas = clustering_.areas()
    assert areas[0][0] == (clustering_.regions.content == 0).float().mean().item()
    assert [sum(a) for a in areas] == pytest.approx([1.0, 1.0])


def test_the_number_is_that_of_the_best_silhouette(plain):
    clustering_ = found(CONTENT, STYLE, regions=0, smoothing=0)
    assert set(clustering_.silhouettes) == set(clustering.CHOICES)
    assert clustering_.count == 3 == max(clustering_.silhouettes, key=clustering_.silhouettes.get)


def test_a_seed_decides_everything():
    sides = [joint_vectors([random(1, 6, 9, 9, seed=s)]) for s in (1, 2)]
    a, b = (cluster(*sides, regions=5, seed=3) for _ in range(2))
    assert torch.equal(a.regions.content, b.regions.content)
    assert torch.equal(a.regions.style, b.regions.style)
    others = [cluster(*sides, regions=5, seed=s).regions.content for s in range(4, 8)]
    assert any(not torch.equal(a.regions.content, o) for o in others)


def test_a_search_ends_when_told():
    sides = [joint_vectors([random(1, 6, 9, 9, seed=s)]) for s in (1, 2)]
    asked = []

    def end_at(count):
        def check():
            asked.append(1)
            if len(asked) == count:
                raise KeyboardInterrupt

        return check

    for count in (1, 2, 5):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            cluster(*sides, check=end_at(count))


def test_frames_share_their_labels_with_the_one_style(plain):
    frames = torch.cat([CONTENT, CONTENT.flip(2), CONTENT.roll(3, 2)])
    regions = found(frames, STYLE, regions=3, smoothing=0).regions
    both = torch.cat([regions.content.flatten(), regions.style.flatten()])
    assert regions.content.shape == frames.shape
    assert adjusted_rand_index(both, torch.cat([frames.flatten(), STYLE.flatten()])) > 0.95


def test_a_small_region_goes_to_the_next_nearest():
    def distances(labels):
        far = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).double() * -10 + 10
        far[:, 1] += 0.5  # so that 0 is the next of all others but 3 for 2
        far[:, 3] += 1.0
        return far

    content = torch.zeros(1, 16, 16, dtype=torch.long)
    content[:, 9:] = 1
    content[0, 3, 3] = content[0, 12, 4] = 2
    style = content.clamp_max(1)
    assert SMALL > 2 / 256
    maps = shared_labels(distances(content), distances(style), 0)
    # Nobody has 3. The two places of 2 are now 0's, wherever they are.
    assert torch.equal(maps.content, torch.where(content == 2, 0, content))
    assert torch.equal(maps.style, style)
    # What one side has enough of stays on both.
    style[0, :2, :2] = 2
    maps = shared_labels(distances(content), distances(style), 0)
    assert torch.equal(maps.content, content)
    # Smoothing comes before counting.
    maps = shared_labels(distances(content), distances(content), 1)
    assert torch.equal(maps.content, content.clamp_max(1).where(content != 2, (content.roll(1, 1))))


def test_regions_that_are_all_small_leave_one():
    distances = torch.rand(1, 200, 20, 20, generator=seeded())
    maps = shared_labels(distances, distances, 0)
    assert maps.content.unique().tolist() == list(range(len(maps.content.unique())))
    assert len(maps.content.unique()) < 100


def test_features_that_are_all_the_same_are_one_region():
    flat = joint_vectors([torch.ones(1, 4, 6, 6)])
    for regions in (0, 3):
        maps = cluster(flat, flat, regions=regions).regions
        assert maps.content.shape == (1, 6, 6)
        # Only the position tells places apart.
        assert torch.equal(maps.content, maps.style)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": 1}, "0 .* or 2 to 16, got 1"),
        ({"regions": 17}, "got 17"),
        ({"smoothing": -1}, "got -1"),
        ({"style": joint_vectors([torch.rand(1, 5, 6, 6)])}, "4 and 5 channels"),
        (dict.fromkeys(("content", "style"), joint_vectors([torch.rand(1, 4, 2, 2)])), "8 positions"),
    ],
)
def test_refusals(change, message):
    sides = {name: joint_vectors([torch.rand(1, 4, 6, 6)]) for name in ("content", "style")}
    with pytest.raises(ValueError, match=message):
        cluster(**(sides | change))


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one stage or more.*got \[\]"):
        joint_vectors([])
    with pytest.raises(ValueError, match="of the same images"):
        joint_vectors([random(1, 3, 4, 4), random(2, 3, 4, 4)])
    with pytest.raises(ValueError, match="of the same images"):
        joint_vectors([random(3, 4, 4)])
