"""The measures of the demo model: perfect pictures reach the floor, known damage is worse in proportion."""

import pytest
import torch
from semantic_style.benchmarks import demo_model
from semantic_style.paperland import model as paperland
from semantic_style.paperland.scenes import COLORS, REGIONS


@pytest.fixture(scope="module")
def model():
    return paperland.load()


@pytest.fixture(scope="module")
def asked():
    return demo_model.drawn(4, 4)


@pytest.fixture(scope="module")
def bank():
    return demo_model.drawn(6, 3)


@pytest.fixture(scope="module")
def perfect(model, asked, bank):
    return demo_model.adherence(model, asked.images, asked, bank)


def test_colours_of_a_caption():
    found = demo_model.caption_colors("red blue striped sky, green charcoal dotted hill, tree")
    assert set(found) == {"sky", "hill"}
    red, blue, green, charcoal = (torch.tensor(COLORS[c]) / 255 for c in ("red", "blue", "green", "charcoal"))
    torch.testing.assert_close(found["sky"], (red + blue) / 2)
    torch.testing.assert_close(found["hill"], green + (charcoal - green) * demo_model.DOT_SHARE)


def test_pictures_that_are_what_was_asked_reach_the_floor_and_damage_does_not(model, asked, bank, perfect):
    """Real scenes as samples have the floor's distance; the more their colours are turned, the further they are."""
    assert perfect["colours"]["own"] == perfect["colours"]["real"] < 0.6 * perfect["colours"]["shuffled"]
    distances = [perfect["colours"]["own"]]
    for share in (0.3, 0.6):
        damaged = torch.lerp(asked.images, 1 - asked.images, share)
        distances.append(demo_model.adherence(model, damaged, asked, bank)["colours"]["own"])
    assert distances == sorted(distances)
    assert distances[-1] > 1.5 * distances[0]


def test_what_is_found_in_pictures_of_nothing_is_told(model, asked, bank, perfect):
    """A picture of one colour has no sun, tree or house; the measure says how much of each it would find there."""
    assert perfect["found"] == perfect["found in real scenes"]
    blank = asked.images.mean(dim=(1, 2), keepdim=True).expand_as(asked.images)
    seen = demo_model.adherence(model, blank, asked, bank)
    assert seen["found"] == seen["found in blank pictures"] == perfect["found in blank pictures"]
    assert sum(seen["found"].values()) < sum(perfect["found"].values())


def test_label_transfer_of_perfect_features_is_perfect(model, monkeypatch):
    """Features that are the labels themselves have all places right, chance and position stay what they are."""
    scenes = {1: demo_model.drawn(4, 1), 2: demo_model.drawn(4, 2)}

    def labels_as_features(_model, images, *_):
        drawn = next(s for s in scenes.values() if torch.equal(s.images, images))
        grids = (demo_model.resample_labels(drawn.labels, (n, n)) for n in (16, 32))
        return [torch.nn.functional.one_hot(g, len(REGIONS)).permute(0, 3, 1, 2).float() for g in grids]

    known = demo_model.correspondence(model, 4)
    monkeypatch.setattr(demo_model, "features", labels_as_features)
    perfect = demo_model.correspondence(model, 4)
    assert perfect["features, 32x32"]["overall"] == 1
    assert perfect["features, 32x32"]["mean of classes"] == 1
    assert perfect["chance"] == known["chance"]
    assert known["chance"]["overall"] < known["features, 32x32"]["overall"] < 1


def test_the_sheet_has_samples_above_their_scenes():
    made, real = torch.zeros(16, 8, 8, 3), torch.ones(16, 8, 8, 3)
    picture = demo_model.sheet(made, real)
    rows = [picture.getpixel((6, 2 + 10 * row + 4))[0] for row in range(4)]
    assert rows == [0, 255, 0, 255]
    assert picture.size == (8 * 10 + 2, 4 * 10 + 2)
