"""MultiGPU work units, where the host has them: copies of the model run parts of a call in threads of their own."""

import importlib.util
from contextlib import contextmanager

import comfy.samplers
import pytest
import torch
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.apply_scsa import Patch, Pictures, apply_scsa
from semantic_style.host.apply_spin import apply_spin
from semantic_style.host.energy_guider import EnergyGuider
from semantic_style.host.invert import InversionTask, invert_ddim
from semantic_style.host.versions import CLONES, without_clones
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers.terms import Energy, SpatialTerm, Stream

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

POSITIVE, NEGATIVE, EMPTY = conditioning(1), conditioning(2), conditioning(3)
SHAPE = (1, 4, 16, 8)


def test_the_copies_are_left_out_and_nothing_else():
    options = {CLONES: {"cpu": None}, "transformer_options": {"patches": {}}}
    assert without_clones(options) == {"transformer_options": {"patches": {}}}
    assert CLONES in options


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def calls_of(patcher):
    """The rows of its network's calls."""
    calls = []
    network = patcher.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    yield calls
    handle.remove()


def on_two_devices():
    """A model, one whose calls are shared with a copy of it, and that copy."""
    model, copy = small_sd15(), small_sd15()
    shared = model.clone()
    copy.load_device = torch.device("cpu", 0)
    copy.is_multigpu_base_clone = True
    copy.clone_base_uuid = shared.clone_base_uuid
    shared.set_additional_models("multigpu", [copy])
    return model, shared, copy


def invert(model, seed):
    return invert_ddim(InversionTask(model, EMPTY, EMPTY, random(*SHAPE, seed=seed) / 0.18215, 3, "normal", 1.0, seed))


def sampled(guider):
    sigmas = torch.tensor([3.0, 1.0, 0.0])
    return guider.sample(random(*SHAPE, seed=9), torch.zeros(SHAPE), comfy.samplers.sampler_object("euler"), sigmas)


def cfg_guider(model):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(POSITIVE, NEGATIVE)
    guider.set_cfg(3.5)
    return guider


if importlib.util.find_spec("comfy.multigpu"):

    def test_spin_s_injection_follows_the_copies():
        model, shared, copy = on_two_devices()
        mask = torch.zeros(1, 16, 8)
        mask[..., 4:] = 1
        expected = sampled(cfg_guider(apply_spin(model, conditioning(4, tokens=11), mask)))
        with calls_of(model) as here, calls_of(copy) as there:
            out = sampled(cfg_guider(apply_spin(shared, conditioning(4, tokens=11), mask)))
        assert here == there == [1, 1]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

    def test_guided_calls_run_on_the_model_itself():
        model, shared, copy = on_two_devices()
        energy = Energy((SpatialTerm(Stream(invert(model, 1)), 0.9),))
        expected = sampled(EnergyGuider(model, POSITIVE, NEGATIVE, 3.5, energy, cache=None))
        with calls_of(copy) as there:
            out = sampled(EnergyGuider(shared, POSITIVE, NEGATIVE, 3.5, energy, cache=None))
        assert there == []
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

    def test_scsa_s_calls_run_on_the_model_itself():
        model, shared, copy = on_two_devices()
        regions = SemanticMap(*(torch.arange(16)[:, None].expand(1, 16, 8) // 8 for _ in range(2)))
        patch = Patch(Pictures(*(invert(model, seed) for seed in range(4))), regions)
        expected = sampled(cfg_guider(apply_scsa(model, patch)))
        with calls_of(copy) as there:
            out = sampled(cfg_guider(apply_scsa(shared, patch)))
        assert there == []
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
