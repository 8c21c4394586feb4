"""SCSA's demo graph without ComfyUI, on a small untrained model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from semantic_style.attention.adain import adain_latents
from semantic_style.attention.color_maps import regions_from_colors
from semantic_style.attention.scsa import Settings
from semantic_style.demo import model as paperland
from semantic_style.demo import scenes, standalone
from semantic_style.demo.scsa import Pictures, ScsaDenoiser
from semantic_style.demo.unet import UNetConfig
from semantic_style.samplers.ddim_inversion import ddim_inversion
from semantic_style.samplers.replay import replay

GRAPH = Path(__file__).resolve().parents[2] / "workflows" / "api" / "scsa_colors.json"
STEPS, SIDE = 3, 64


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> paperland.Paperland:
    torch.manual_seed(0)
    config = UNetConfig(channels=32, multipliers=(1, 1, 1), context_channels=16, head_channels=16)
    model = paperland.Paperland(config).eval().requires_grad_(False)
    monkeypatch.setattr(standalone, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(paperland, "load", lambda **options: model)
    return model


def test_the_graph_is_the_published_recipe(small: paperland.Paperland) -> None:
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    titles = {}
    for node in graph.values():
        for name in ("width", "height", "steps"):
            if name in node["inputs"]:
                node["inputs"][name] = STEPS if name == "steps" else SIDE
        titles[node["_meta"]["title"]] = node["inputs"]
    made = dict(standalone.run_graph(graph))
    assert set(made) == {"Content", "Style", "Regions", "Restyled"}

    drawn = [
        scenes.scene(i["layout_seed"], i["style_seed"], (SIDE, SIDE))
        for i in (titles["Draw the content"], titles["Draw the style"])
    ]
    regions = regions_from_colors(*(scenes.label_image(d.labels) for d in drawn)).regions
    empty, sigmas = small.text([""]), paperland.sigmas_normal(STEPS)
    images = [*(d.images for d in drawn), *(scenes.label_image(d.labels) for d in drawn)]
    plain = small.guided(empty, empty, 1.0)
    inverted = [ddim_inversion(plain, paperland.encode_pixels(i), sigmas) for i in images]
    content, style = inverted[:2]
    strength = titles["AdaIN per region"]["strength"]
    start = adain_latents(content.trajectory[1], style.trajectory[1], regions, strength)
    model = ScsaDenoiser(small, Pictures(*inverted), regions, Settings(), empty)
    out = paperland.decode_pixels(replay(model, start, sigmas[1:], inversion=content))
    expected = (out[0].numpy() * 255).clip(0, 255)
    assert np.abs(np.asarray(made["Restyled"], dtype=float) - expected).max() < 1.5
    assert np.abs(expected - np.asarray(made["Content"], dtype=float)).mean() > 5


def test_what_runs_in_comfyui_only_is_refused() -> None:
    numbers = {"temperature": 1.2, "t1": 0.8, "t2": 0.2, "a1": 0.3, "a2": 0.5}
    apply = standalone.NODES["SemanticStyleApplySCSA"]
    for setting in ({"blocks": "2"}, {"end_percent": 0.5}, {"start_percent": 0.5}):
        with pytest.raises(ValueError, match="in ComfyUI only"):
            apply(None, None, None, None, None, **numbers, **setting)
