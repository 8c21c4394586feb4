"""Decoder stages found by structure, and reading them through the hook protocol."""

import pytest
import torch
from semantic_style.attention.layers import feature_blocks
from semantic_style.paperland.unet import PaperlandUNet, UNetConfig
from semantic_style.samplers.features import FeatureTap
from torch import nn


class Upsample(nn.Module):
    pass


def decoder(*with_upsampler: int, blocks: int) -> nn.Module:
    """A network whose decoder blocks of these numbers end with an upsampling layer."""
    unet = nn.Module()
    unet.output_blocks = nn.ModuleList(
        nn.Sequential(nn.Identity(), Upsample()) if i in with_upsampler else nn.Sequential(nn.Identity())
        for i in range(blocks)
    )
    return unet


@pytest.mark.parametrize(
    ("upsamplers", "blocks", "expected"),
    [((2, 5, 8), 12, (6, 9)), ((2, 5), 9, (3, 6)), ((1, 3), 6, (2, 4))],
    ids=["SD1.x", "SDXL", "Paperland"],
)
def test_stages_are_found_by_structure(upsamplers, blocks, expected):
    assert feature_blocks(decoder(*upsamplers, blocks=blocks)) == expected


def test_networks_without_such_stages_are_refused():
    with pytest.raises(ValueError, match="no decoder blocks"):
        feature_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="1 upsampling layers"):
        feature_blocks(decoder(2, blocks=6))


def test_tap_reads_what_enters_the_blocks_and_changes_nothing():
    torch.manual_seed(0)
    unet = PaperlandUNet(UNetConfig(channels=32, multipliers=(1, 1, 2), context_channels=16, head_channels=16)).eval()
    x, t, context = torch.randn(2, 48, 16, 16), torch.tensor([10.0, 500.0]), torch.randn(2, 5, 16)
    tap = FeatureTap(feature_blocks(unet))
    entering = {}
    for block in tap.blocks:
        before = unet.output_blocks[block - 1]
        before.register_forward_hook(lambda module, args, out, block=block: entering.update({block: out}))
    base = {"patches": {"output_block_patch": [lambda h, skip, options: (h, skip)]}}
    with torch.no_grad():
        out = unet(x, t, context, tap.options(base))
        assert torch.equal(out, unet(x, t, context))
    assert tap.blocks == (2, 4)
    assert [tuple(tap.features[b].shape) for b in tap.blocks] == [(2, 64, 8, 8), (2, 32, 16, 16)]
    for block in tap.blocks:
        assert torch.equal(tap.features[block], entering[block])
    assert len(base["patches"]["output_block_patch"]) == 1


def test_rows_that_lead_in_are_not_read():
    torch.manual_seed(0)
    unet = PaperlandUNet(UNetConfig(channels=32, multipliers=(1, 1, 2), context_channels=16, head_channels=16)).eval()
    x, t, context = torch.randn(6, 48, 16, 16), torch.full((6,), 10.0), torch.randn(6, 5, 16)
    tap = FeatureTap(feature_blocks(unet), leading=1)
    with torch.no_grad():
        unet(x, t, context, tap.options({"cond_or_uncond": [1, 0], "uuids": ["one", "two"]}))
        every = tap.features[tap.blocks[0]]
        seen = list(tap.read((16, 16)).values())
    assert [part.count for part in seen] == [2, 2]
    assert torch.equal(seen[0].stages[0], every[1:3])
    assert torch.equal(seen[1].stages[0], every[4:6])
