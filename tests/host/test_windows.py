"""What the pack reads of context windows, whoever makes them."""

from types import SimpleNamespace

import pytest
import torch
from newer_hosts import host_window
from semantic_style.host.windows import Window, set_window_step, window_of_call


def comfyui_s(frames, anchor=None):
    window = SimpleNamespace(index_list=frames)
    if anchor is not None:
        window.causal_anchor_index = anchor
    return {"context_window": window}


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, None),
        ({"ad_params": None}, None),
        ({"ad_params": {"full_length": 8, "context_length": None, "sub_idxs": None}}, None),
        ({"ad_params": {"full_length": 8, "context_length": 4, "sub_idxs": [6, 7, 0, 1]}}, Window((), (6, 7, 0, 1))),
        (comfyui_s([2, 4, 6]), Window((), (2, 4, 6))),
        (comfyui_s([2, 3], anchor=1), Window((1,), (2, 3))),
        (comfyui_s([0, 1], anchor=-1), Window((), (0, 1))),
    ],
)
def test_the_window_of_a_call(options, window):
    assert window_of_call(options) == window


def test_rows_are_the_anchors_and_then_the_frames():
    assert Window((1,), (2, 3)).rows == (1, 2, 3)


def test_comfyui_s_own_window_is_understood():
    window = host_window([1, 2, 5], 6)
    assert window_of_call({"context_window": window}) == Window((), (1, 2, 5))
    window.causal_anchor_index = 0
    assert window_of_call({"context_window": window}) == Window((0,), (1, 2, 5))


def test_windows_get_the_step_of_the_level():
    state, sigmas = SimpleNamespace(current_step=0), torch.tensor([9.0, 4.0, 1.0, 0.0])
    for step, sigma in enumerate(sigmas):
        set_window_step({"transformer_options": {"ADGS": state}}, sigmas, sigma.expand(3))
        assert state.current_step == step
    options = {"transformer_options": {}}
    set_window_step(options, sigmas, sigmas[1:2])
    assert options == {"transformer_options": {}}
