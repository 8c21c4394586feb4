"""Which models are refused, and how a replay knows the model of its inversion."""

import re
from dataclasses import replace
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_sampling
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux, ModelSamplingSD3
from newer_hosts import FORMATS, quantised
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.model_sampling import check_latent_kind, check_unet, path_of
from semantic_style.host.models import check_same, identify
from semantic_style.nodes.nodes_auto_map import AutoMap
from semantic_style.nodes.nodes_inversion import DDPMInversion
from semantic_style.nodes.nodes_saliency import FindSubject
from semantic_style.nodes.nodes_semantix import AS_SET, KSampler


@pytest.fixture(scope="module")
def model():
    return small_sd15()


@pytest.mark.parametrize(
    ("model_type", "path"),
    [(name, "ve") for name in ("EPS", "V_PREDICTION", "EDM", "V_PREDICTION_EDM", "V_PREDICTION_CONTINUOUS")]
    + [("FLOW_COSMOS", "ve"), ("FLOW", "flow"), ("FLUX", "flow")],
)
def test_the_path_of_every_kind_of_model(model_type, path):
    random = small_sd15(model_type=model_type)
    assert path_of(random) == path
    if path == "ve":
        check_unet(random)


@pytest.mark.parametrize("model_type", ["STABLE_CASCADE", "IMG_TO_IMG"])
def test_other_models_are_refused(model_type):
    with pytest.raises(ValueError, match=f"{model_type}.*cannot be inverted.*Flux"):
        path_of(small_sd15(model_type=model_type))


def test_latents_that_are_no_pictures_are_refused():
    for latent_format in (comfy.latent_formats.StableAudio1(), comfy.latent_formats.ACEAudio()):
        with pytest.raises(ValueError, match="no pictures and no video"):
            path_of(small_sd15(latent_format=latent_format))
    with pytest.raises(ValueError, match="several tensors at once"):
        check_latent_kind(SimpleNamespace(is_nested=True))  # what newer hosts call a NestedTensor
    check_latent_kind(torch.zeros(1, 4, 8, 8))


def test_noise_of_another_size_is_refused(model):
    class Loud(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
            return super().noise_scaling(sigma, 8.0 * noise, latent_image)

    loud = model.clone()
    loud.add_object_patch("model_sampling", Loud())
    with pytest.raises(ValueError, match="none that this pack knows"):
        path_of(loud)


def test_what_a_node_put_on_the_model_counts(model):
    (flow,) = ModelSamplingSD3().patch(model, 3.0)
    (flux,) = ModelSamplingFlux().patch(model, 1.15, 0.5, 1024, 1024)
    for patched in (flow, flux):
        assert path_of(patched) == "flow"
        with pytest.raises(ValueError, match=r"CONST\) is a flow model: what works with it is DDPM and DDIM Inversion"):
            check_unet(patched)
    (v_prediction,) = ModelSamplingDiscrete().patch(model, "v_prediction", True)
    assert path_of(v_prediction) == "ve"
    with pytest.raises(ValueError, match=r"EPS.*V_PREDICTION"):
        check_same(identify(model), identify(v_prediction), allow_other=True)
    # A shift is in the schedule: it does not make another model.
    (shifted,) = ModelSamplingSD3().patch(model, 6.0)
    check_same(identify(flow), identify(shifted), allow_other=False)


def test_another_structure_never_fits(model):
    wider = identify(small_sd15(model_channels=64))
    with pytest.raises(ValueError, match=r"another kind of model: .* M parameters.*the guider has: .* M parameters"):
        check_same(identify(model), wider, allow_other=True)


def test_other_weights_need_permission(model):
    other = identify(small_sd15(seed=1))
    with pytest.raises(ValueError, match=r"weights \w{6}; the guider has: .*weights \w{6}.*allow_other_model"):
        check_same(identify(model), other, allow_other=False)
    check_same(identify(model), other, allow_other=True)


def test_a_fine_tune_is_another_checkpoint(model):
    tuned = small_sd15()
    with torch.no_grad():
        for parameter in tuned.model.diffusion_model.parameters():
            parameter += 0.05 * parameter.std(unbiased=False) * torch.randn_like(parameter)
    with pytest.raises(ValueError, match="another checkpoint"):
        check_same(identify(model), identify(tuned), allow_other=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_checkpoint_in_another_precision(model, dtype):
    check_same(identify(model), identify(small_sd15(dtype=dtype)), allow_other=False)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_checkpoint_with_quantised_weights(model, kind):
    """In either direction; its structure is the same, whatever stands for the weights."""
    twin = identify(quantised(small_sd15(), kind))
    assert twin.structure == identify(model).structure
    assert twin.dtype == {"float8_e4m3fn": "torch.float8_e4m3fn", "int8_tensorwise": "torch.int8"}.get(kind, "4-bit")
    check_same(identify(model), twin, allow_other=False)
    check_same(twin, identify(small_sd15(dtype=torch.float16)), allow_other=False)
    other = identify(quantised(small_sd15(seed=1), kind))
    with pytest.raises(ValueError, match="another checkpoint"):
        check_same(identify(model), other, allow_other=False)


def test_what_quantised_layers_keep_beside_their_weights_is_no_structure(model):
    scaled = small_sd15()
    layer = scaled.model.diffusion_model.output_blocks[4][1].transformer_blocks[0].attn1.to_q
    layer.register_parameter("input_scale", torch.nn.Parameter(torch.ones(()), requires_grad=False))
    check_same(identify(model), identify(scaled), allow_other=False)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_lora_is_an_edit_and_not_another_model(loaded):
    import comfy.model_management

    model = small_sd15()
    before = identify(model)
    patched = model.clone()
    keys = {
        key: ("diff", (torch.ones_like(value),))
        for key, value in model.model.state_dict().items()
        if key.endswith("weight")
    }
    assert patched.add_patches(keys)
    if loaded:
        comfy.model_management.load_models_gpu([patched])
        key = next(iter(patched.backup))
        assert not torch.equal(patched.backup[key].weight, model.model.state_dict()[key])
    check_same(before, identify(patched), allow_other=False)
    # The host may still have another node's patches on the shared weights when the plain model comes next.
    check_same(before, identify(model), allow_other=False)


def test_where_the_check_cannot_be_made_it_says_so(model, caplog):
    known = identify(model)
    unread = replace(known, weights=())
    for made_with, now, message in (
        (None, known, "does not say which model"),
        (unread, known, "inversion's model .* could not be read"),
        (known, unread, "weights of this model .* cannot be read"),
    ):
        caplog.clear()
        check_same(made_with, now, allow_other=False)
        assert re.search(f"{message}.*not checked whether both are one checkpoint", caplog.text)
    caplog.clear()
    check_same(known, known, allow_other=False)
    check_same(unread, known, allow_other=True)
    assert not caplog.text


def test_reports_say_that_the_checkpoint_was_not_checked(model):
    image = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    image["samples"][:, :, 5:10, 4:8] += 8
    prompt = conditioning(1)
    known = DDPMInversion.execute(model, prompt, prompt, image, 1, "normal", 1.0, 0).args[0]
    unread = replace(known, model=replace(known.model, weights=()))

    def reports(inversion):
        inputs = (model, prompt, prompt, inversion, inversion, 1.0, AS_SET, 0.0, 0.0, 0.0, 0.0)
        yield KSampler.execute(*inputs).args[2]
        yield AutoMap.execute(model, inversion, inversion, 2, 1, 0).args[1]
        yield FindSubject.execute(model, 0.3, 0.5, "hard", 0, 1, 0, inversion=inversion).args[2]

    for told, untold in zip(reports(unread), reports(known), strict=True):
        assert told.count("not checked whether both are one checkpoint") == 1
        assert "not checked" not in untold


def test_weights_that_cannot_be_read_are_told_of(caplog):
    """As quantised weights are: they hold integers."""
    integers = small_sd15()
    for module in integers.model.diffusion_model.modules():
        if getattr(module, "weight", None) is not None:
            module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    assert identify(integers).weights == ()
    check_same(identify(integers), identify(integers), allow_other=False)
    assert "not checked whether both are one checkpoint" in caplog.text
