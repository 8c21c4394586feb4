"""What a gradient is thought to need of memory, against what it takes; and which blocks are checkpointed for it."""

import logging
import math
from types import SimpleNamespace

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from semantic_style.benchmarks import gradient_memory
from semantic_style.benchmarks.live_memory import LiveMemory
from semantic_style.benchmarks.random_models import (
    ReportingGuider,
    conditioning,
    pooled_conditioning,
    sd15_config,
    small_sd15,
    small_sdxl,
)
from semantic_style.benchmarks.text_models import RIGHT, small_clip
from semantic_style.host.energy_guider import summary
from semantic_style.host.gradient_memory import SHARE, Part, choose_for
from semantic_style.host.invert import InversionTask, invert_ddpm
from semantic_style.host.learn_word import LearningTask, learn_embedding
from semantic_style.host.pseudo_words import make_prompt
from semantic_style.samplers.terms import Energy, SemanticTerm, SpatialTerm, Stream, StyleTerm
from semantic_style.samplers.word_learning import LearningSettings

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

NEAR = 0.2  # of the measured bytes, what the estimate may miss
WIDTH = 32
KINDS = {"sd15": (small_sd15, conditioning), "sdxl": (small_sdxl, pooled_conditioning)}


@pytest.fixture
def free(monkeypatch):
    """Sets what the host says is free."""

    def tell(size):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: size)

    return tell


class OnePrediction(comfy.samplers.Sampler):
    """A sampler that asks for one prediction, and counts the model's rows and the bytes that live at once."""

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=0):
        with LiveMemory() as memory:
            self.denoised = guider(noise, sigmas[:1].expand(len(noise)), **extra_args)
        self.peak = memory.peak
        return noise


class Subject:
    """A small twin with inversions of two pictures."""

    def __init__(self, kind, size=(48, 32), dtype=torch.float32):
        make, prompt = KINDS[kind]
        # Weights made in inference mode would be made again in the first guided step.
        with torch.inference_mode(False):
            self.model, self.prompt = make(WIDTH, dtype), prompt(1)
        self.rows = []
        self.model.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, self.count)
        image = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
        self.inversions = [
            invert_ddpm(
                InversionTask(self.model, self.prompt, self.prompt, image, 2, "normal", 1.0, seed), noise_maps=False
            )
            for seed in (1, 2)
        ]
        self.rows.clear()

    def count(self, executor, x, *args, **kwargs):
        self.rows.append(len(x))
        return executor(x, *args, **kwargs)

    def predict(self, **settings):
        kept, style = (Stream(i, self.prompt) for i in self.inversions)
        energy = Energy((StyleTerm(style, 3.0), SpatialTerm(kept, 0.9), SemanticTerm(kept, 1.0)))
        guider = ReportingGuider(self.model, self.prompt, self.prompt, 1.0, energy, cache=None, **settings)
        asked, start = OnePrediction(), self.inversions[0].at(2.0)
        guider.sample(start, torch.zeros_like(start), asked, torch.tensor([2.0, 0.0]), disable_pbar=True, seed=0)
        return asked, guider.report


@pytest.fixture(scope="module", params=KINDS)
def subject(request):
    return Subject(request.param)


def test_a_guided_step_takes_what_was_foreseen_and_fits_where_it_is_made_to(subject, free):
    """Of the small twins of both UNets; measured within 10%."""
    free(10**12)
    plain, report = subject.predict()
    assert report.checkpointed == 0
    assert report.foreseen_bytes == pytest.approx(plain.peak, rel=NEAR)
    most, total = report.foreseen_bytes, report.blocks

    all_of_them, report = subject.predict(checkpointing=True)
    assert report.checkpointed == total
    assert report.foreseen_bytes == pytest.approx(all_of_them.peak, rel=NEAR)
    assert torch.equal(all_of_them.denoised, plain.denoised)
    least = report.foreseen_bytes
    assert least < 0.5 * most

    chosen = []
    for share in (0.8, 0.5, 0.2):
        limit = least + share * (most - least)
        free(math.ceil(limit / SHARE))
        some, report = subject.predict()
        chosen.append(report.checkpointed)
        assert report.foreseen_bytes <= limit
        assert report.foreseen_bytes == pytest.approx(some.peak, rel=NEAR)
        assert torch.equal(some.denoised, plain.denoised)
        assert f"{report.checkpointed} of {total} blocks checkpointed" in summary(report)
    assert 0 < chosen[0] < chosen[1] < chosen[2] < total


def test_what_does_not_fit_is_said_before_the_model_is_asked(subject, free, caplog):
    free(10**6)
    subject.rows.clear()
    with pytest.raises(MemoryError, match=r"0\.\d GB of memory on cpu besides the model, 0\.0 GB are free") as refused:
        subject.predict()
    assert subject.rows == []
    assert 'checkpointing "always"' in str(refused.value)
    with caplog.at_level(logging.WARNING):
        asked, _ = subject.predict(checkpointing=True)
    assert "are free, with all blocks checkpointed" in caplog.text
    assert asked.denoised.isfinite().all()


def test_room_is_made_on_a_device_by_unloading_what_the_run_does_not_use(monkeypatch, caplog):
    management, gpu = comfy.model_management, torch.device("cuda")
    model, control, other = small_sd15(), small_sd15(), small_sd15()
    loaded = [management.LoadedModel(patcher) for patcher in (model, control, other)]
    free, asked = [3 * 2**30], []

    def unload(need, device, keep_loaded=()):
        asked.append((need, device, keep_loaded))
        free[0] = 9 * 2**30

    monkeypatch.setattr(management, "current_loaded_models", loaded)
    monkeypatch.setattr(management, "get_free_memory", lambda *_: free[0])
    monkeypatch.setattr(management, "free_memory", unload)
    guider = SimpleNamespace(model_patcher=model, loaded_models=[control])
    parts = [Part(torch.nn.Identity(), 2**30, 0) for _ in range(4)]
    with caplog.at_level(logging.INFO):
        choice = choose_for(guider, parts, 0, 0, gpu, always=False, what="a step")
    assert asked == [(int(5.5 * 2**30 / SHARE), gpu, loaded[:2])]
    assert (choice.blocks, choice.need) == ((), 5.5 * 2**30)
    assert "a step takes about 5.5 GB of memory on cuda besides the model, 9.0 GB are free; 0 of 4" in caplog.text
    choose_for(guider, parts, 0, 0, gpu, always=False, what="a step")
    assert len(asked) == 1, "nothing is unloaded where there is room"


def test_weights_of_another_dtype_are_copied_for_the_gradient(free):
    """A model that is computed in float32 and stored in half of that keeps a copy of every weight."""
    free(10**12)
    subject = Subject("sd15", (16, 16))
    _, plain = subject.predict()
    cast = Subject("sd15", (16, 16), torch.float16)
    cast.model.model.manual_cast_dtype = torch.float32
    for layer in cast.model.model.diffusion_model.modules():
        if hasattr(layer, "comfy_cast_weights"):
            layer.comfy_cast_weights = True
    asked, report = cast.predict(allow_other_model=True)
    assert report.foreseen_bytes > 1.5 * plain.foreseen_bytes
    assert report.foreseen_bytes == pytest.approx(asked.peak, rel=NEAR)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_step_of_learning_a_word_fits_where_it_is_made_to(kind, free, caplog, monkeypatch):
    model = small_sdxl(WIDTH, pooled=RIGHT) if kind == "sdxl" else small_sd15(WIDTH)
    prompt = make_prompt(small_clip(kind), "<it>", "house", 2)
    latent = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = LearningSettings(steps=1, batch=2, checks=1)

    def learnt(checkpointing=False):
        caplog.clear()
        with caplog.at_level(logging.INFO), LiveMemory() as memory:
            learn_embedding(LearningTask(model, prompt, latent, None, settings, checkpointing))
        (said,) = (r.args for r in caplog.records if "blocks are checkpointed" in r.getMessage())
        return memory.peak, said

    free(10**12)
    most, (_, none, total) = learnt()
    least, (_, every, _) = learnt(checkpointing=True)
    assert (none, every) == (0, total)
    assert least < 0.6 * most
    free(int((least + most) / 2))
    some, (_, chosen, _) = learnt()
    assert 0 < chosen < total
    assert some < (least + most) / 2
    free(10**5)
    with pytest.raises(MemoryError, match="a step of the learning takes about"):
        learnt()


def test_the_benchmark_measures_without_computing_anything(monkeypatch):
    """A card that is a little small for the guided step, to which the host's weights leave some megabytes."""
    config = sd15_config(WIDTH)
    monkeypatch.setattr(gradient_memory, "CARDS", {"small": gradient_memory.TAKEN + 40 * 2**20})
    with torch.inference_mode(False):
        guided, learning = gradient_memory.rows_of("narrow", config, 256)
    for (_, weights, none, foreseen, every, least, blocks, measured), total in ((guided, 32), (learning, 37)):
        assert float(foreseen) == pytest.approx(float(none), rel=NEAR)
        assert float(least) == pytest.approx(float(every), rel=NEAR)
        assert float(every) < float(none)
        assert blocks.split(" ")[2] == str(total)
        assert measured == "as before" or float(measured) <= 40 - float(weights)
