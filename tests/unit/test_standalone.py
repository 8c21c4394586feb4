"""The demo graphs without ComfyUI: the same files, the same pictures."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from semantic_style.demo import model as paperland
from semantic_style.demo import motion, run, scenes, sheet, solver, standalone
from semantic_style.demo.client import Graph, Progress
from semantic_style.demo.unet import UNetConfig

LEVEL_OF_GREY = 1.01


@pytest.fixture
def _small_untrained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    small = paperland.Paperland(UNetConfig(channels=32, multipliers=(1, 1, 1))).eval().requires_grad_(False)
    monkeypatch.setattr(standalone, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(paperland, "load", lambda **options: small)


def scene(layout: int, style: int) -> dict:
    seeds = {"layout_seed": layout, "style_seed": style, "width": 64, "height": 48}
    return {"class_type": "SemanticStylePaperlandScene", "inputs": seeds, "_meta": {"title": "Scene"}}


def node(kind: str, title: str = "", **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}


def reconstruction(style_of_noise: int | None = None) -> Graph:
    """Invert a scene and replay it; with `style_of_noise` from a start that takes that scene's statistics."""
    inversion = {"model": ["1", 0], "positive": ["3", 0], "negative": ["3", 0], "steps": 4, "scheduler": "normal"}
    inversion |= {"cfg": 2.0, "seed": 5}
    graph = {
        "1": node("SemanticStylePaperlandModel", precision="fp32"),
        "2": scene(1, 1),
        "3": node("SemanticStylePaperlandEncode", clip=["1", 1], caption=["2", 2]),
        "4": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
        "5": node("SemanticStyleDDPMInversion", latent=["4", 0], **inversion),
        "6": node("SemanticStyleReplay", inversion=["5", 0], skip=1, exact=True),
        "7": node("CFGGuider", model=["1", 0], positive=["3", 0], negative=["3", 0], cfg=2.0),
        "8": node(
            "SamplerCustomAdvanced",
            noise=["6", 0],
            guider=["7", 0],
            sampler=["6", 1],
            sigmas=["6", 2],
            latent_image=["6", 3],
        ),
        "9": node("VAEDecode", samples=["8", 0], vae=["1", 2]),
        "10": node("SaveImage", "Replayed", images=["9", 0], filename_prefix="x"),
        "11": node("PreviewImage", "Given", images=["2", 0]),
    }
    if style_of_noise is not None:
        graph |= {
            "20": scene(2, style_of_noise),
            "21": node("VAEEncode", pixels=["20", 0], vae=["1", 2]),
            "22": node("SemanticStyleDDPMInversion", latent=["21", 0], **inversion),
            "23": node("SemanticStyleInversionLatent", inversion=["5", 0], step=1),
            "24": node("SemanticStyleInversionLatent", inversion=["22", 0], step=1),
            "25": node("SemanticStyleMapFromLabels", content=["2", 1], style=["20", 1]),
            "26": node("SemanticStyleAdaIN", content=["23", 0], style=["24", 0], strength=1.0, semantic_map=["25", 0]),
        }
        graph["6"]["inputs"]["start"] = ["26", 0]
    return graph


@pytest.mark.usefixtures("_small_untrained_model")
def test_a_graph_is_run_and_its_titles_become_labels() -> None:
    seen: list[Progress] = []
    pictures = standalone.run_graph(reconstruction(), seen.append)
    assert [label for label, _ in pictures] == ["Replayed", "Given"]
    replayed, given = (np.asarray(picture).astype(int) for _, picture in pictures)
    expected = (scenes.scene(1, 1, (48, 64)).images[0] * 255).numpy()
    assert np.abs(given - expected).max() <= LEVEL_OF_GREY
    assert np.abs(replayed - given).max() <= LEVEL_OF_GREY, "an exact replay is the picture"
    assert max(progress.fraction for progress in seen) <= 1
    assert {("SemanticStyleDDPMInversion", 4), ("SamplerCustomAdvanced", 3)} <= {(p.title, p.maximum) for p in seen}


@pytest.mark.usefixtures("_small_untrained_model")
def test_another_start_gives_another_picture() -> None:
    plain, styled = (standalone.run_graph(graph)[0][1] for graph in (reconstruction(), reconstruction(9)))
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(styled)).mean() > 1


@pytest.mark.usefixtures("_small_untrained_model")
def test_only_what_the_pictures_need_is_run() -> None:
    graph = {**reconstruction(), "30": node("LoadImage", image="nowhere.png")}
    assert len(standalone.run_graph(graph)) == 2


@pytest.mark.usefixtures("_small_untrained_model")
def test_a_node_of_comfyui_s_own_is_refused_by_name() -> None:
    graph = {"1": node("LoadImage", image="a.png"), "2": node("SaveImage", images=["1", 0], filename_prefix="x")}
    with pytest.raises(standalone.Missing, match=r"LoadImage \(node 1\) runs in ComfyUI only"):
        standalone.run_graph(graph)
    graph = reconstruction()
    graph["5"]["inputs"]["scheduler"] = "karras"
    with pytest.raises(standalone.Missing, match="'karras' runs in ComfyUI only"):
        standalone.run_graph(graph)


@pytest.mark.parametrize("name", [graph.name for graph in run.GRAPHS])
def test_every_demo_graph_can_be_run_without_comfyui(name: str) -> None:
    graph = next(graph for graph in run.GRAPHS if graph.name == name).load()
    for node_id, entry in graph.items():
        assert entry["class_type"] in standalone.NODES, f"node {node_id}"
        inspect.signature(standalone.NODES[entry["class_type"]]).bind(None, **entry["inputs"])
        if "scheduler" in entry["inputs"]:
            assert entry["inputs"]["scheduler"] == "normal"
    assert any(entry["class_type"] in standalone.SHOW for entry in graph.values())


@pytest.mark.usefixtures("_small_untrained_model")
def test_pictures_from_a_caption_are_a_batch() -> None:
    sampling = {"seed": 3, "steps": 3, "cfg": 2.0, "sampler_name": "dpmpp_2m", "scheduler": "normal", "denoise": 1.0}
    graph = {
        "1": node("SemanticStylePaperlandModel", precision="fp32"),
        "2": node("SemanticStylePaperlandEncode", clip=["1", 1], caption="teal and cream wavy water"),
        "3": node("PrimitiveInt", value=2),
        "4": node("SemanticStylePaperlandLatent", width=32, height=48, batch_size=["3", 0]),
        "5": node("KSampler", model=["1", 0], positive=["2", 0], negative=["2", 0], latent_image=["4", 0], **sampling),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", "Drawn", images=["6", 0], filename_prefix="x"),
    }
    pictures = standalone.run_graph(graph)
    assert [(label, picture.size) for label, picture in pictures] == [("Drawn", (32, 48))] * 2
    graph["5"]["inputs"]["sampler_name"] = "heun"
    with pytest.raises(standalone.Missing, match="'heun'"):
        standalone.run_graph(graph)


def test_the_sampler_is_of_second_order() -> None:
    """For data ~ N(0, 1) the denoiser is x / (1 + sigma^2) and the flow scales x by sqrt(1 + sigma^2)."""

    def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x / (1 + sigma.view(-1, 1) ** 2)

    def error(steps: int) -> float:
        sigmas = torch.logspace(1, -2, steps + 1, dtype=torch.float64)
        x = torch.ones(1, 1, dtype=torch.float64) * (1 + sigmas[0] ** 2).sqrt()
        out = solver.dpm_solver_2m(gaussian, x, sigmas, lambda value, maximum: None)
        return abs(float(out) - float((1 + sigmas[-1] ** 2).sqrt()))

    assert error(80) < 1e-3
    assert error(40) / error(80) > 3


def restyling(**settings: object) -> Graph:
    """Two scenes inverted, the one restyled like the other by an energy."""
    graph = reconstruction(style_of_noise=9)
    weights = {"style_weight": 3.0, "spatial_weight": 0.9, "semantic_weight": 1.0, "position_weight": 3.0}
    inputs = {"model": ["1", 0], "positive": ["3", 0], "negative": ["3", 0], "context": ["5", 0]}
    inputs |= {"reference": ["22", 0], "cfg": 2.0, "weights": "as set below", "semantic_map": ["25", 0]}
    graph["30"] = node("SemanticStyleKSampler", **{**inputs, **weights, **settings})
    graph["31"] = node("VAEDecode", samples=["30", 0], vae=["1", 2])
    return {
        **{number: entry for number, entry in graph.items() if number not in ("9", "10")},
        "32": node("SaveImage", "Restyled", images=["31", 0], filename_prefix="x"),
        "33": node("PreviewImage", "Plot", images=["30", 1]),
    }


@pytest.mark.usefixtures("_small_untrained_model")
def test_restyling_by_an_energy() -> None:
    def pictures(**settings: object) -> dict[str, np.ndarray]:
        made = standalone.run_graph(restyling(**settings))
        return {label: np.asarray(picture).astype(int) for label, picture in made}

    nothing = {"style_weight": 0.0, "spatial_weight": 0.0, "semantic_weight": 0.0}
    kept, by_adain = pictures(**nothing, adain_start=1.0), pictures(**nothing)
    guided, preset = pictures(), pictures(weights="published for images", **nothing)
    assert np.abs(kept["Restyled"] - kept["Given"]).max() <= LEVEL_OF_GREY, "nothing is switched on"
    assert np.abs(by_adain["Restyled"] - kept["Given"]).mean() > 1
    assert np.abs(guided["Restyled"] - by_adain["Restyled"]).mean() > 0.1
    assert np.array_equal(guided["Restyled"], preset["Restyled"])
    assert guided["Plot"].shape == (600, 900, 3)
    assert not np.array_equal(guided["Plot"], kept["Plot"])


@pytest.mark.usefixtures("_small_untrained_model")
def test_a_replay_with_adain_is_another_picture() -> None:
    plain, styled = reconstruction(9), reconstruction(9)
    for graph in (plain, styled):
        del graph["6"]["inputs"]["start"]
    styled["6"]["inputs"] |= {"adain_reference": ["22", 0], "adain_start": 0.0, "semantic_map": ["25", 0]}
    (_, given), (_, changed) = (standalone.run_graph(graph)[0] for graph in (plain, styled))
    assert np.abs(np.asarray(given).astype(int) - np.asarray(changed)).mean() > 1


def test_a_moving_scene_becomes_one_animation() -> None:
    drawn = {"layout_seed": 3, "style_seed": 4, "frames": 5, "speed": 4.0, "width": 64, "height": 48}
    webp = {"filename_prefix": "x", "fps": 8.0, "lossless": True, "quality": 90, "method": "default"}
    graph = {
        "1": node("SemanticStylePaperlandClip", **drawn),
        "2": node("SaveAnimatedWEBP", "Moving", images=["1", 0], **webp),
    }
    ((label, animation),) = standalone.run_graph(graph)
    shown = sheet.frames(animation)
    expected = (motion.clip(3, 4, 5, (48, 64), 4.0).images * 255).numpy().astype(np.uint8)
    assert (label, len(shown)) == ("Moving", 5)
    assert np.array_equal(np.stack([np.asarray(frame) for frame in shown]), expected)
