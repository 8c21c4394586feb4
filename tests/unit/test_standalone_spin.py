"""Spin's demo graphs without ComfyUI: the counterparts of the nodes, and the graph on a small untrained model."""

from __future__ import annotations

import inspect
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from semantic_style.attention.masks import keep_outside, mask_on_grid
from semantic_style.demo import model as paperland
from semantic_style.demo import scenes, spin, standalone, standalone_spin
from semantic_style.demo.standalone_spin import NODES, Captions, MaskedLatent, WithSpin, sample_masked
from semantic_style.demo.text import IT
from semantic_style.demo.unet import UNetConfig, attention
from semantic_style.samplers.ddpm_inversion import ddpm_inversion
from semantic_style.samplers.embedding import Settings
from semantic_style.samplers.injection import Injection

GRAPHS = Path(__file__).resolve().parents[2] / "workflows" / "api"
LEARNING = {"tokens": 2, "steps": 3, "learning_rate": 0.1, "batch": 2, "seed": 7}


def silent(value: int, maximum: int) -> None:
    """A report that goes nowhere."""


@pytest.fixture(scope="module")
def small() -> paperland.Paperland:
    torch.manual_seed(0)
    config = UNetConfig(channels=32, multipliers=(1, 1, 1), context_channels=16, head_channels=16)
    return paperland.Paperland(config).eval().requires_grad_(False)


def drawn() -> tuple[scenes.Scenes, torch.Tensor]:
    scene = scenes.single("sun", 1, 2, (48, 64))
    return scene, scenes.object_mask(scene.labels)


def test_captions_say_what_the_run_has_learnt(small: paperland.Paperland) -> None:
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    clip = Captions(small.text)
    assert torch.equal(clip(["embedding:mine sun"]), small.text(["sun"])), "not learnt yet: left out"
    clip.learnt["mine"] = vectors
    expected = small.text([f"red {IT} sun", "teal sky"], {IT: vectors})
    assert torch.equal(clip(["red embedding:mine sun", "teal sky"]), expected)


@pytest.mark.parametrize("given", ["latent", "image"])
def test_an_embedding_is_the_one_that_spin_learns(small: paperland.Paperland, given: str) -> None:
    scene, subject = drawn()
    picture = {"image": {"image": scene.images, "vae": paperland}, "latent": {}}[given]
    picture |= {"latent": paperland.encode_pixels(scene.images)} if given == "latent" else {}
    clip, seen = Captions(small.text), []
    tokens, said, _ = NODES["SemanticStyleSpinEmbedding"](
        lambda *done: seen.append(done),
        small,
        clip,
        "sun",
        name="mine",
        saliency=subject,
        skip_clean=0.4,
        **LEARNING,
        **picture,
    )
    settings = Settings(3, 0.1, batch=2, seed=7, skip_clean=0.4)
    learned = spin.learn_subject(small, scene.images, subject, "sun", 2, settings)
    assert torch.equal(tokens, small.text([f"{IT} sun"], {IT: learned.vectors["text"]}))
    assert said == "embedding:mine"
    assert torch.equal(clip([f"{said} sun"]), tokens)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_subject_is_found_by_the_demo_model() -> None:
    model, scene = paperland.load(), scenes.single("sun", 304, 15)
    subject, seen = scenes.object_mask(scene.labels) > 0, []
    given = {"latent": paperland.encode_pixels(scene.images), "prompt": model.text([""]), "image": scene.images}
    settings = {"sigma": 0.3, "threshold": 0.5, "mode": "hard", "grow": 0, "looks": 2, "seed": 0}
    find = NODES["SemanticStyleSaliency"]
    mask, preview, _ = find(lambda *done: seen.append(done), model, **settings, **given)
    found = mask > 0
    assert (found & subject).sum() > 0.5 * (found | subject).sum()
    # Inside the picture is as it was but for the edge drawn around the subject, outside it is dark.
    assert (preview[found] == scene.images[found]).all(dim=-1).float().mean() > 0.5
    assert preview[~found].mean() < scene.images[~found].mean()
    assert seen == [(1, 2), (2, 2)]
    for missing in ("prompt", "image", "latent"):
        with pytest.raises(ValueError, match="in ComfyUI only"):
            find(silent, model, **settings, **(given | {missing: None}))


def test_an_embedding_needs_a_picture(small: paperland.Paperland) -> None:
    with pytest.raises(ValueError, match="an image with its vae"):
        NODES["SemanticStyleSpinEmbedding"](silent, small, Captions(small.text), "sun", name="mine", **LEARNING)


def test_only_the_mask_is_painted(small: paperland.Paperland) -> None:
    """The latent outside is the background's, bit for bit, and the inside follows the reference's tokens."""
    scene, mask = drawn()
    clean, sigmas = paperland.encode_pixels(scene.images), paperland.sigmas_normal(3)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    positive, negative, reference = small.text(["teal sky"]), small.text([""]), small.text(["red sun"])
    latent = NODES["SetLatentNoiseMask"](silent, clean, mask)[0]
    (model, same) = NODES["SemanticStyleApplySpin"](silent, small, reference, positive, mask, 1.0, 0.0, 1.0, 0)
    assert same is positive
    options = Injection(small.unet, reference, mask, attention).options()
    made = sample_masked(model.guided(positive, negative, 2.0), latent, noise, sigmas, silent)
    plain = sample_masked(small.guided(positive, negative, 2.0), latent, noise, sigmas, silent)
    outside = (torch.nn.functional.interpolate(mask[:, None], clean.shape[2:], mode="bilinear") == 0).expand_as(clean)
    assert torch.equal(made[outside], clean[outside])
    assert (made - plain)[~outside].abs().max() > 1e-3
    again = small.guided(positive, negative, 2.0, options)
    assert torch.equal(made, sample_masked(again, latent, noise, sigmas, silent))


def test_without_a_mask_all_is_painted(small: paperland.Paperland) -> None:
    clean, sigmas = paperland.encode_pixels(drawn()[0].images), paperland.sigmas_normal(2)
    guided = small.guided(small.text(["red sun"]), small.text([""]), 1.0)
    noise = torch.ones_like(clean)
    everything = MaskedLatent(clean, torch.ones(1, 48, 64))
    assert torch.equal(
        sample_masked(guided, clean, noise, sigmas, silent), sample_masked(guided, everything, noise, sigmas, silent)
    )


def test_the_style_energy_guides_a_model_with_spin(small: paperland.Paperland) -> None:
    scene, mask = drawn()
    clean, sigmas = paperland.encode_pixels(scene.images), paperland.sigmas_normal(3)
    positive, negative = small.text(["teal sky"]), small.text([""])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    model = WithSpin(small, small.text(["red sun"]), mask)
    levels = ddpm_inversion(small.guided(positive, negative, 1.0), clean, sigmas, seed=1)
    levels = replace(levels, positive=[[positive, {}]])
    shifts = []
    for weight in (0.0, 3.0):
        (energy,) = NODES["SemanticStyleSpinStyleEnergy"](silent, levels, mask, weight, 0.0, 1.0)
        (guider,) = NODES["SemanticStyleEnergyGuider"](silent, model, positive, negative, 2.0, energy)
        shifts.append(sample_masked(guider.on(sigmas), clean, noise, sigmas, silent))
    unguided = sample_masked(model.guided(positive, negative, 2.0), clean, noise, sigmas, silent)
    assert torch.allclose(shifts[0], unguided, atol=1e-4)
    assert (shifts[1] - unguided).abs().max() > 1e-2


@pytest.mark.parametrize("tapered", [True, False])
def test_a_mask_grows_by_places(tapered: bool) -> None:
    mask = torch.zeros(1, 9, 11)
    spots = [(0, 0, 0.5), (4, 6, 1.0)]
    for y, x, value in spots:
        mask[0, y, x] = value
    expected = torch.zeros_like(mask)
    for (y, x), (at, beside, value) in itertools.product(itertools.product(range(9), range(11)), spots):
        down, right = abs(y - at), abs(x - beside)
        if (down + right if tapered else max(down, right)) <= 3:
            expected[0, y, x] = max(expected[0, y, x], value)
    assert torch.equal(NODES["GrowMask"](silent, mask, 3, tapered)[0], expected)
    with pytest.raises(ValueError, match="in ComfyUI only"):
        NODES["GrowMask"](silent, mask, -1, tapered)


def test_a_grown_mask_makes_whole_places() -> None:
    """What the demo graphs rely on: after growing by a place's side, every place that the mask touches is all white
    to the host's resampling."""
    mask = scenes.object_mask(scenes.single("sun", 5, 5).labels)
    grown = NODES["GrowMask"](silent, mask, paperland.PATCH, True)[0]
    seen = torch.nn.functional.interpolate(grown[:, None], (32, 32), mode="bilinear")[:, 0]
    assert (seen[mask_on_grid(mask, (32, 32)) > 0] == 1).all()


def test_pictures_and_words_are_put_together() -> None:
    scene, mask = drawn()
    other = scene.images.flip(1)
    (kept,) = NODES["SemanticStyleKeepBackground"](silent, other, scene.images, mask, 0)
    assert torch.equal(kept, keep_outside(other, scene.images, mask))
    (laid,) = NODES["ImageCompositeMasked"](silent, scene.images, other, 0, 0, False, mask)
    assert torch.equal(laid, torch.where(mask[..., None] > 0, other, scene.images))
    with pytest.raises(ValueError, match="in ComfyUI only"):
        NODES["ImageCompositeMasked"](silent, scene.images, other, 3, 0, False, mask)
    assert NODES["StringConcatenate"](silent, "red", "embedding:a", " ") == ("red embedding:a",)


def test_what_runs_in_comfyui_only_is_refused(small: paperland.Paperland) -> None:
    tokens, mask = small.text(["sun"]), torch.ones(1, 8, 8)
    with pytest.raises(ValueError, match="in ComfyUI only"):
        NODES["SemanticStyleApplySpin"](silent, small, tokens, tokens, mask, 1.0, 0.2, 1.0, 0)
    with pytest.raises(ValueError, match="'ddim' runs in ComfyUI only"):
        NODES["KSamplerSelect"](silent, "ddim")
    assert standalone_spin.starting_noise(silent, 5) == (5,)


@pytest.mark.parametrize("name", ["spin_insert", "spin_insert_text", "spin_with_scsa"])
def test_every_demo_form_can_be_run_without_comfyui(name: str) -> None:
    graph = json.loads((GRAPHS / f"{name}.json").read_text(encoding="utf-8"))
    for number, node in graph.items():
        assert node["class_type"] in standalone.NODES, f"node {number}"
        inspect.signature(standalone.NODES[node["class_type"]]).bind(None, **node["inputs"])


def test_a_graph_says_what_it_has_learnt(small: paperland.Paperland, monkeypatch: pytest.MonkeyPatch) -> None:
    """spin_insert_text with a few steps: its pictures are the graph's, and the words change the inside only."""
    monkeypatch.setattr(standalone, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(paperland, "load", lambda **options: small)
    graph = json.loads((GRAPHS / "spin_insert_text.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    # The subject is found by the trained model only.
    (find,) = (n for n, node in graph.items() if node["class_type"] == "SemanticStyleSaliency")
    (reference,) = (n for n, node in graph.items() if node["_meta"]["title"] == "Draw the reference")
    (learn,) = (node for node in graph.values() if node["class_type"] == "SemanticStyleSpinEmbedding")
    learn["inputs"]["saliency"] = [reference, 4]
    del graph[find]
    made = {label: np.asarray(picture).astype(int) for label, picture in standalone.run_graph(graph)}
    assert list(made) == ["Reference", "Background", "As learnt", "Green, said once", "Green, said twice"]
    (mask,) = (node["inputs"] for node in graph.values() if node["_meta"]["title"] == "Draw the mask")
    drawn_mask = scenes.chosen(mask["only"], mask["layout_seed"], mask["style_seed"])
    outside = scenes.object_mask(drawn_mask.labels)[0].numpy() == 0
    ways = [made[way] for way in list(made)[2:]]
    for one, other in itertools.combinations([made["Background"], *ways], 2):
        assert np.array_equal(one[outside], other[outside])
        assert (one != other).any()
