"""What a run does not need it does not do: calls of the model for references."""

import pytest
import torch
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.energy_guider import EnergyGuider
from semantic_style.host.invert import InversionTask, invert_ddpm
from semantic_style.host.replay_sampler import ReplaySampler
from semantic_style.host.semantix_transfer import make_energy, sample
from semantic_style.samplers.semantix_energy import Weights
from semantic_style.samplers.step_adain import StepAdaIN

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

PROMPT, EMPTY = conditioning(1), conditioning(3)
STEPS, CFG = 4, 3.5


@pytest.fixture(scope="module")
def model():
    return small_sd15()


def inverted(model, seed, prompt, cfg, **settings):
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) / 0.18215
    return invert_ddpm(InversionTask(model, prompt, EMPTY, image, STEPS, "normal", cfg, 7), **settings)


def restyled(model, context, reference):
    """What the node Semantix Style Transfer Sampler does."""
    energy = make_energy(context, reference, Weights())
    guider = EnergyGuider(model, PROMPT, EMPTY, CFG, energy, cache=None)
    return sample(guider, ReplaySampler(context, adain=StepAdaIN(reference, STEPS)))


def test_a_reference_of_semantix_costs_no_call_of_its_own(model):
    rows = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    context = inverted(model, 1, PROMPT, CFG)
    with_maps = inverted(model, 2, EMPTY, 1.0)
    before = sum(rows)
    reference = inverted(model, 2, EMPTY, 1.0, noise_maps=False)
    assert sum(rows) == before
    handle.remove()
    assert torch.equal(restyled(model, context, reference), restyled(model, context, with_maps))
