"""Every node's mask input takes masks in every shape that nodes give them in."""

import asyncio
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.benchmarks.text_models import small_clip
from semantic_style.nodes import SemanticStyleExtension
from semantic_style.nodes.nodes_adain import ReplayAdaIN
from semantic_style.nodes.nodes_embedding import SpinEmbedding
from semantic_style.nodes.nodes_inversion import DDPMInversion, Replay
from semantic_style.nodes.nodes_maps import MapFromMasks
from semantic_style.nodes.nodes_picture import FitPicture
from semantic_style.nodes.nodes_semantix import AS_SET, KSampler, SemantixEnergy
from semantic_style.nodes.nodes_spin import ApplySpin, KeepBackground, SpinStyleEnergy

import nodes

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

PROMPT, EMPTY = conditioning(1), conditioning(2)


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return small_sd15()


@pytest.fixture(scope="module")
def inversion(model):
    image = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    return DDPMInversion.execute(model, PROMPT, EMPTY, image, 2, "normal", 1.0, 0).args[0]


@pytest.fixture(autouse=True)
def embeddings(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))


def half():
    mask = torch.zeros(1, 64, 64)
    mask[:, 32:] = 1
    return mask


def embedding(mask, model, inversion):
    out = SpinEmbedding.execute(
        model, small_clip("sd1"), "house", 1, 2, 1e-2, 1, 0, "it", None, inversion, saliency=mask
    )
    return out.result[0][0][0]


def from_masks(mask, model, inversion):
    return MapFromMasks.execute([mask, 1 - mask], [half(), 1 - half()], ["auto"]).result[0].content


def from_style_masks(mask, model, inversion):
    return MapFromMasks.execute([half(), 1 - half()], [mask, 1 - mask], ["auto"]).result[0].style


def restyled(mask, model, inversion, name="mask"):
    weights = (1.0, AS_SET, 3.0, 0.9, 0.0, 0.0)
    return KSampler.execute(model, PROMPT, EMPTY, inversion, inversion, *weights, **{name: mask}).result[0]["samples"]


def restyled_part(mask, model, inversion):
    return restyled(mask, model, inversion, "content_mask")


def restyled_from_part(mask, model, inversion):
    return restyled(mask, model, inversion, "style_mask")


def style_term(mask, model, inversion, name="content_mask"):
    weights = (AS_SET, 3.0, 0.9, 0.0, 0.0, 0.0, 1.0)
    return getattr(SemantixEnergy.execute(inversion, inversion, *weights, **{name: mask}).result[0].terms[0], name)


def style_term_from(mask, model, inversion):
    return style_term(mask, model, inversion, "style_mask")


def along_replay(mask, model, inversion, name="content_mask"):
    sampler = Replay.execute(inversion, 0, True).result[1]
    (adain,) = ReplayAdaIN.execute(sampler, inversion, 0.0, 1.0, **{name: mask}).result[0].adains
    return getattr(adain, name)


def along_replay_from(mask, model, inversion):
    return along_replay(mask, model, inversion, "style_mask")


def spun(mask, model, inversion):
    patched = ApplySpin.execute(model, PROMPT, EMPTY, mask, 1.0, 0.0, 1.0, 0).result[0]
    (wrapper,) = patched.get_wrappers("outer_sample", "semantic_style_spin")
    return wrapper.spin.mask


def energy(mask, model, inversion):
    return SpinStyleEnergy.execute(inversion, mask, 1.0, 0.0, 1.0).result[0].terms[0].mask


def pasted(mask, model, inversion):
    return KeepBackground.execute(torch.ones(1, 64, 64, 3), torch.zeros(1, 64, 64, 3), mask, 2).result[0]


def fitted(mask, model, inversion):
    vae = SimpleNamespace(spacial_compression_encode=lambda: 8)
    return FitPicture.execute(torch.zeros(1, 64, 64, 3), model, vae, mask, 64).result[1]


INPUTS = {
    ("SemanticStyleSpinEmbedding", "saliency"): embedding,
    ("SemanticStyleMapFromMasks", "content"): from_masks,
    ("SemanticStyleMapFromMasks", "style"): from_style_masks,
    ("SemanticStyleKSampler", "mask"): restyled,
    ("SemanticStyleKSampler", "content_mask"): restyled_part,
    ("SemanticStyleKSampler", "style_mask"): restyled_from_part,
    ("SemanticStyleSemantixEnergy", "content_mask"): style_term,
    ("SemanticStyleSemantixEnergy", "style_mask"): style_term_from,
    ("SemanticStyleReplayAdaIN", "content_mask"): along_replay,
    ("SemanticStyleReplayAdaIN", "style_mask"): along_replay_from,
    ("SemanticStyleApplySpin", "mask"): spun,
    ("SemanticStyleSpinStyleEnergy", "mask"): energy,
    ("SemanticStyleKeepBackground", "mask"): pasted,
    ("SemanticStyleFitPicture", "mask"): fitted,
}
# These nodes hand their masks to Fit Picture, Keep Background and Map from Masks.
SIMPLE = {
    ("SemanticStyleSemantixRestyle", "content_mask"),
    ("SemanticStyleSemantixRestyle", "style_mask"),
    ("SemanticStyleSCSARestyle", "content_masks"),
    ("SemanticStyleSCSARestyle", "style_masks"),
    ("SemanticStyleSpinPaint", "mask"),
    ("SemanticStyleSpinPaint", "reference_mask"),
}


def test_these_are_all_mask_inputs():
    every = asyncio.run(SemanticStyleExtension().get_node_list())
    schemas = [node.define_schema() for node in every]
    found = {(s.node_id, i.id) for s in schemas for i in s.inputs if isinstance(i, io.Mask.Input)}
    assert found == set(INPUTS) | SIMPLE


@pytest.mark.parametrize("use", INPUTS.values(), ids=lambda use: use.__name__)
def test_a_mask_with_a_channel_axis_or_without_batch_is_the_same(use, model, inversion):
    """[B, 1, H, W] is what the host's RemoveBackground gives."""
    mask = half()
    expected = use(mask, model, inversion)
    for same in (mask[:, None], mask[0], mask.half()):
        assert torch.equal(use(same, model, inversion), expected)


CROPPED = (embedding, restyled, energy, style_term, style_term_from, along_replay, along_replay_from)


@pytest.mark.parametrize("use", CROPPED, ids=lambda use: use.__name__)
def test_a_mask_of_the_picture_before_its_encoding_is_cropped_with_it(use, model, inversion):
    """The latent of 8x8 places stands for the middle 64x64 of 71x70 pixels."""
    mask = torch.zeros(1, 71, 70)
    mask[:, 3 + 16 : 3 + 48, 3 + 8 : 3 + 40] = 1
    assert torch.equal(use(mask, model, inversion), use(mask[:, 3:67, 3:67], model, inversion))


def test_a_spun_mask_is_cropped_with_the_picture_as_well(model):
    mask = torch.zeros(1, 71, 70)
    mask[:, 3 + 16 : 3 + 48, 3 + 8 : 3 + 40] = 1
    image = {"samples": torch.zeros(1, 4, 8, 8)}

    def made(mask):
        patched = ApplySpin.execute(model, PROMPT, EMPTY, mask, 1.0, 0.0, 1.0, 0).result[0]
        return nodes.common_ksampler(patched, 0, 2, 3.0, "euler", "normal", EMPTY, EMPTY, image)[0]["samples"]

    assert torch.equal(made(mask), made(mask[:, 3:67, 3:67]))


@pytest.mark.parametrize("use", INPUTS.values(), ids=lambda use: use.__name__)
def test_what_is_no_mask_is_named(use, model, inversion):
    for bad, message in (
        (torch.ones(1, 64, 64, 3), r"must be \[B, H, W\]"),
        (half() * 255, r"scale it to 0..1"),
        (half() * torch.nan, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            use(bad, model, inversion)
