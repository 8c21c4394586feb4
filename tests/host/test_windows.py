"""What the pack reads of context windows, whoever makes them."""

from types import SimpleNamespace

import pytest
import torch
from semantic_style.host.windows import frames_of_call, set_window_step


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({}, None),
        ({"ad_params": None}, None),
        ({"ad_params": {"full_length": 8, "context_length": None, "sub_idxs": None}}, None),
        ({"ad_params": {"full_length": 8, "context_length": 4, "sub_idxs": [6, 7, 0, 1]}}, (6, 7, 0, 1)),
        ({"context_window": SimpleNamespace(index_list=[2, 4, 6])}, (2, 4, 6)),
    ],
)
def test_frames_of_a_call(options, frames):
    assert frames_of_call(options) == frames


def test_comfyui_s_own_window_is_understood():
    from comfy.context_windows import IndexListContextWindow

    assert frames_of_call({"context_window": IndexListContextWindow([1, 2, 5])}) == (1, 2, 5)


def test_windows_get_the_step_of_the_level():
    state, sigmas = SimpleNamespace(current_step=0), torch.tensor([9.0, 4.0, 1.0, 0.0])
    for step, sigma in enumerate(sigmas):
        set_window_step({"transformer_options": {"ADGS": state}}, sigmas, sigma.expand(3))
        assert state.current_step == step
    options = {"transformer_options": {}}
    set_window_step(options, sigmas, sigmas[1:2])
    assert options == {"transformer_options": {}}
