"""The node that measures flicker, on clips whose flicker is known."""

import pytest
import torch
from semantic_style.nodes.nodes_video import MeasureFlicker
from semantic_style.paperland.motion import clip


def test_flicker_of_known_noise_and_of_none():
    scene = clip(3, 4, 4, (64, 64))
    assert MeasureFlicker.execute(scene.images, scene.images, scene.labels).args[0] == 0.0
    frames = torch.tensor([0.0, 0.1, 0.0, 0.1]).reshape(4, 1, 1, 1)
    excess, report = MeasureFlicker.execute(0.5 * scene.images + frames, scene.images, scene.labels).args
    assert excess == pytest.approx(0.1, abs=1e-4)
    assert "0.1000" in report
    assert "% of pixels" in report
    with_alpha = torch.cat([scene.images, torch.rand(4, 64, 64, 1)], dim=-1)
    assert MeasureFlicker.execute(with_alpha, scene.images).args[0] == 0.0


def test_clips_that_cannot_be_compared_are_refused():
    frames = torch.rand(3, 8, 8, 3)
    with pytest.raises(ValueError, match="two clips of the same frames"):
        MeasureFlicker.execute(frames[:2], frames)
    with pytest.raises(ValueError, match="one frame"):
        MeasureFlicker.execute(frames[:1], frames[:1])
