"""What a word's attention is on: layers put together, the walk against a plain one, planted things, refusals."""

import math

import pytest
import torch
from semantic_style.attention.layers import word_layers
from semantic_style.paperland.unet import PaperlandUNet, UNetConfig
from semantic_style.regions.saliency import compactness
from semantic_style.regions.word_subject import ALIKE, COMPACT, LEAST, REACH, attention_of, find_by_word, neighbours
from torch import nn


def planted(size=(16, 20), subject=(slice(6, 11), slice(8, 13)), seed=0):
    """Features of sky over ground with something before both, and where that is."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(12, 3, generator=generator, dtype=torch.float64)).Q.T
    labels = torch.zeros(size, dtype=torch.long)
    labels[size[0] // 2 :] = 1
    labels[subject] = 2
    return directions[labels].movedim(-1, 0), labels == 2


def test_attention_on_a_part_spreads_over_the_thing_and_not_beyond_it():
    features, truth = planted()
    seen = torch.zeros(truth.shape)
    seen[7:10, 9:12] = 1.0
    found = find_by_word(features, [[seen]], share=0.1)
    assert torch.equal(found.hard, truth)
    assert found.contact == 0
    assert (found.cuts, found.touching) == (0, False)
    assert found.soft[~truth].max() < 0.01
    assert find_by_word(features, [[seen]], share=0.99).area < found.area
    # The same thing on a grid twice as fine.
    fine = features.repeat_interleave(2, 1).repeat_interleave(2, 2)
    found = find_by_word(fine, [[seen]], share=0.1, max_side=18)
    assert torch.equal(found.hard, truth.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_levels_are_multiplied_the_finer_one_counts_twice():
    coarse, other = torch.tensor([[4.0, 2.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    fine = torch.tensor([[0.5, 1.0], [0.25, 1.0]])
    # Layers of a level are averaged from least to peak: (1 + 1) / 2, (1/2 + 0) / 2, (1/4 + 1) / 2, 0.
    shares = torch.tensor([[1.0, 0.25], [0.625, LEAST]]), torch.tensor([[1 / 3, 1.0], [LEAST, 1.0]])
    expected = shares[0].double() ** (1 / 3) * shares[1].double() ** (2 / 3)
    torch.testing.assert_close(attention_of([[coarse, other], [fine]], (2, 2)), expected)
    scaled = attention_of([[7 * coarse + 2, other / 3], [fine * 100 + 9]], (2, 2))
    torch.testing.assert_close(scaled, expected)
    # A layer that tells nothing takes nothing away.
    flat = attention_of([[torch.ones(2, 2)], [fine]], (2, 2))
    torch.testing.assert_close(flat / flat.max(), shares[1].double() ** (2 / 3))
    assert attention_of([[torch.rand(8, 4)], [torch.rand(16, 8)]], (12, 6)).shape == (12, 6)


def test_a_step_of_the_walk_is_what_plain_loops_make_of_it():
    f = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centred = f - f.mean(dim=(1, 2), keepdim=True)
    at = [(y, x) for y in range(3) for x in range(4)]
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for i, (y, x) in enumerate(at):
        for j, (v, u) in enumerate(at):
            a, b = centred[:, y, x], centred[:, v, u]
            alike = max(0.0, float(a @ b / (a.norm() * b.norm())) - ALIKE)
            expected[i, j] = alike * math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * REACH**2))
    torch.testing.assert_close(neighbours(f), expected / expected.sum(dim=1, keepdim=True))


def test_where_attention_is_strewn_the_strongest_thing_is_taken():
    features, truth = planted()
    features[:, truth] = -features[:, :1, :1].squeeze(-1)
    seen = torch.where(truth, 1.0, 0.0)
    seen[3, :], seen[13, :] = 0.7, 0.7
    found = find_by_word(features, [[seen]], share=0.3)
    assert compactness(found.hard) >= COMPACT
    assert found.hard[8, 10]
    assert not found.hard[[3, 13]].any()


def test_what_cannot_be_found_is_told():
    features, _ = planted()
    with pytest.raises(ValueError, match="same everywhere: the picture does not show it"):
        find_by_word(features, [[torch.ones(4, 4)]])
    with pytest.raises(ValueError, match="features are the same everywhere"):
        find_by_word(torch.ones(3, 8, 8), [[torch.rand(8, 8)]])
    for share in (-0.1, 0.0, 1.0):
        with pytest.raises(ValueError, match="share of the attention's peak"):
            find_by_word(features, [[torch.rand(8, 8)]], share)


def test_layers_are_those_of_the_decoder_levels_that_a_prompt_tells():
    unet = PaperlandUNet(UNetConfig())
    coarse = ((("output", 0, 0), ("output", 1, 0)), (("output", 2, 0), ("output", 3, 0)))
    assert word_layers(unet) == (*coarse, (("output", 4, 0),))
    unet.output_blocks[4][1].transformer_blocks[0].attn2 = None
    assert word_layers(unet) == coarse
    with pytest.raises(ValueError, match="no cross-attention in its decoder"):
        word_layers(PaperlandUNet(UNetConfig(depth_out=((0, 0),) * 3)))
    with pytest.raises(ValueError, match="no decoder blocks"):
        word_layers(nn.Linear(2, 2))
