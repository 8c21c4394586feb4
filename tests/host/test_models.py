"""Which models are refused, and how a replay knows the model of its inversion."""

import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux, ModelSamplingSD3
from semantic_style.benchmarks.random_models import small_sd15
from semantic_style.host.models import check_invertible, check_same, identify


@pytest.fixture(scope="module")
def model():
    return small_sd15()


@pytest.mark.parametrize("model_type", ["EPS", "V_PREDICTION", "EDM", "V_PREDICTION_EDM", "V_PREDICTION_CONTINUOUS"])
def test_models_that_add_noise_pass(model_type):
    check_invertible(small_sd15(model_type=model_type))


@pytest.mark.parametrize("model_type", ["FLOW", "FLUX", "FLOW_COSMOS", "STABLE_CASCADE", "IMG_TO_IMG"])
def test_other_models_are_refused(model_type):
    with pytest.raises(ValueError, match=f"{model_type}.*cannot be inverted"):
        check_invertible(small_sd15(model_type=model_type))


def test_what_a_node_put_on_the_model_counts(model):
    (flow,) = ModelSamplingSD3().patch(model, 3.0)
    with pytest.raises(ValueError, match="flow models"):
        check_invertible(flow)
    (flux,) = ModelSamplingFlux().patch(model, 1.15, 0.5, 1024, 1024)
    with pytest.raises(ValueError, match="flow models"):
        check_invertible(flux)
    (v_prediction,) = ModelSamplingDiscrete().patch(model, "v_prediction", True)
    check_invertible(v_prediction)
    with pytest.raises(ValueError, match=r"EPS.*V_PREDICTION"):
        check_same(identify(model), identify(v_prediction), allow_other=True)


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


def test_an_inversion_of_unknown_make_fits_every_model(model):
    check_same(None, identify(model), allow_other=False)
