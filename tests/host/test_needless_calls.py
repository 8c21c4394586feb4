"""What a run does not need it does not do: calls of the model for references, waiting for the device in its steps."""

import collections
import sys
from pathlib import Path

import comfy.samplers
import pytest
import torch
from semantic_style.attention.scsa_attention import ScsaSettings
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.apply_scsa import Patch, Pictures, apply_scsa
from semantic_style.host.energy_guider import EnergyGuider
from semantic_style.host.invert import InversionTask, invert_ddim, invert_ddpm
from semantic_style.host.reference_cache import ReferenceCache
from semantic_style.host.replay_sampler import ReplayNoise, ReplaySampler
from semantic_style.host.semantix_transfer import make_energy, sample
from semantic_style.regions.semantic_map import SemanticMap
from semantic_style.samplers import finite
from semantic_style.samplers.semantix_energy import Weights
from semantic_style.samplers.step_adain import StepAdaIN
from torch.utils._python_dispatch import TorchDispatchMode

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
    return sample(guider, ReplaySampler(context, adains=(StepAdaIN(reference, STEPS),)))


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


# Operations whose result the host has to wait for: a number, or a tensor whose size depends on values.
WAITS = {
    *("item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "allclose"),
}
# What reads the levels of an inversion, which lie on the CPU; and what comes at a run's end, of all steps at once.
NO_WAITING = ("Inversion.", "check_schedule", "HostModel.", "ddim_inversion", "FiniteWatch._look", "GuidanceReport.")
ROOT = Path(__file__).resolve().parents[2]


class Waits(TorchDispatchMode):
    """Counts, by function of the pack, the operations for which a host would wait for its device. Those that run in
    ComfyUI are not ours.
    """

    def __init__(self):
        super().__init__()
        self.by = collections.Counter()

    def note(self):
        frame = sys._getframe(2)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if "comfy" in file.parts:
                return
            if file.is_relative_to(ROOT) and "tests" not in file.parts and ".venv" not in file.parts:
                self.by[frame.f_code.co_qualname] += 1
                return
            frame = frame.f_back

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.__name__.split(".")[0] in ("index", "index_put", "index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if by_mask or func.__name__.split(".")[0] in WAITS:
            self.note()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """As on a device that is behind: nothing that it was asked for is known before the end."""
    monkeypatch.setattr(finite, "is_known", lambda *_: False)
    counted = Waits()

    def counting(method):
        def counts(self, *args, **kwargs):
            counted.note()
            return method(self, *args, **kwargs)

        return counts

    # A tensor on the CPU is read by these without any operation.
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    return counted


def for_a_step_more(waits, run):
    """What a run of one step more waits for, by function of the pack."""
    found = []
    for steps in (STEPS, STEPS + 1):
        ready = run(steps)
        waits.by.clear()
        with waits:
            ready()
        found.append(collections.Counter(waits.by))
    assert sum(found[0].values()) > 0, "checks before and after the steps are seen"
    more = found[1] - found[0]
    return {name: count for name, count in more.items() if not name.startswith(NO_WAITING)}


def noisy(seed, size=(16, 8)):
    return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed)) / 0.18215


@pytest.mark.parametrize("by_regions", [False, True])
def test_a_guided_step_does_not_wait_for_the_device(model, waits, by_regions):
    labels = torch.arange(16 * 8).reshape(1, 16, 8) // 40
    maps = SemanticMap(labels, labels.flip(1)) if by_regions else None

    def run(steps):
        context, reference = (
            invert_ddpm(InversionTask(model, prompt, EMPTY, noisy(seed), steps, "normal", CFG, 7), noise_maps=replayed)
            for seed, prompt, replayed in ((1, PROMPT, True), (2, EMPTY, False))
        )
        energy = make_energy(context, reference, Weights(), semantic_map=maps)
        guider = EnergyGuider(model, PROMPT, EMPTY, CFG, energy, cache=None)
        return lambda: sample(guider, ReplaySampler(context, adains=(StepAdaIN(reference, steps, 0.0),)))

    assert for_a_step_more(waits, run) == {}


@pytest.mark.parametrize(("known", "ours"), [(True, True), (False, True), (True, False)])
def test_a_step_with_scsa_does_not_wait_for_the_device(model, waits, known, ours):
    labels = torch.arange(16 * 8).reshape(1, 16, 8) // 40

    def run(steps):
        cache = ReferenceCache(10**8) if known else None
        tasks = [InversionTask(model, EMPTY, EMPTY, noisy(seed), steps, "normal", 1.0, 7) for seed in range(4)]
        pictures = Pictures(*(invert_ddim(task, cache=cache) for task in tasks))
        patch = Patch(pictures, SemanticMap(labels, labels.flip(1)), ScsaSettings())
        guider = comfy.samplers.CFGGuider(apply_scsa(model, patch, cache))
        guider.set_conds(EMPTY, EMPTY)
        guider.set_cfg(1.0)
        content = pictures.content
        latent = content.to_outer(content.clean)
        noise = ReplayNoise(content).generate_noise({"samples": latent})
        sampler = ReplaySampler(content) if ours else comfy.samplers.sampler_object("euler")
        return lambda: guider.sample(noise, latent, sampler, content.sigmas, disable_pbar=True, seed=0)

    # What is the level is known of our own samplers only.
    assert for_a_step_more(waits, run) == ({} if ours else {"levels_of": 1})


@pytest.mark.parametrize("invert", [invert_ddim, invert_ddpm])
def test_a_step_of_an_inversion_does_not_wait_for_the_device(model, waits, invert):
    def run(steps):
        return lambda: invert(InversionTask(model, PROMPT, EMPTY, noisy(1), steps, "normal", CFG, 7))

    assert for_a_step_more(waits, run) == {}
