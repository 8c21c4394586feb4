"""Spin's semantic embedding (see `samplers.embedding`) through the host: MODEL and CLIP as they are loaded.

The run happens inside the host's guider, which loads the model and the text encoder together, applies LoRAs, hooks and
wrappers, and cleans up when the run ends or fails; what is ours is the sampler object that it calls.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..samplers.word_learning import JUDGED_LEVELS, Learned, LearningSettings, check_saliency, learn
from .conditioning import has_motion, stream_conds, tokens_of
from .extra_calls import extra_call_options
from .gradient_memory import Call, Choice, choose_for, graph_parts, text_bytes
from .gradients import differentiable, ordinary
from .model_sampling import check_unet
from .models import check_channels, computed_in
from .progress import TimeLeft
from .pseudo_words import Prompt

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

OURS = "semantic_style_embedding"


@dataclass(frozen=True, eq=False)
class LearningTask:
    """What to learn from and how.

    Attributes:
        model: the host's MODEL; patches of its attention are left aside, weights' patches and wrappers stay.
        prompt: around the pseudo-word, with the CLIP.
        latent: [B, C, *S] pictures of the subject in the host's coordinates.
        saliency: [1 or B, h, w] on the latent's grid; None for the whole picture.
        settings: see `samplers.embedding`.
        checkpointing: less memory for the gradient, more time: of all blocks, or of as few as make a step fit.
        broken_off: gets what was learnt when the run is cancelled or fails after its first step.
    """

    model: "ModelPatcher"
    prompt: Prompt
    latent: Tensor
    saliency: Tensor | None = None
    settings: LearningSettings = field(default_factory=LearningSettings)
    checkpointing: bool = False
    broken_off: Callable[[Learned], None] | None = None


def learn_embedding(task: LearningTask) -> Learned:
    """Learn the pseudo-word's vectors; the result's tensors are ordinary ones on the CPU.

    Raises:
        ValueError: a model, latent or mask that cannot be used, before any model call.
        FloatingPointError: a loss or gradient that is not finite.
    """
    model = task.model.clone()
    check_unet(model)
    latent = task.latent.float()
    check_channels(model, latent)
    saliency = torch.ones(1, *latent.shape[-2:]) if task.saliency is None else task.saliency.float().cpu()
    check_saliency(saliency, latent)
    levels = model.get_model_object("model_sampling").sigmas
    # Loaded with the model, in one call of the host's: neither pushes the other out of the memory.
    model.set_additional_models(OURS, [task.prompt.clip.patcher])
    guider = comfy.samplers.CFGGuider(model)
    if has_motion(guider):
        raise ValueError(
            "this MODEL has a motion module (AnimateDiff), which takes pictures for frames of one clip: connect the "
            "MODEL from before it; the embedding works with the motion module later"
        )
    start = [[c.detach(), extra] for c, extra in task.prompt.conditioning(task.prompt.start)]
    guider.set_conds(start, start)
    sampler = _Learning(task, saliency, levels.detach().float())
    # The host makes room for a call of this size.
    rows = max(task.settings.batch, JUDGED_LEVELS)
    try:
        guider.sample(
            torch.zeros(rows, *latent.shape[1:]),
            latent,
            sampler,
            torch.tensor([float(levels[-1]), 0.0]),
            callback=latent_preview.prepare_callback(model, task.settings.steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=task.settings.seed,
        )
    except BaseException:
        if sampler.learned is not None and task.broken_off is not None:
            task.broken_off(_finished(sampler.learned, model))
        raise
    assert sampler.learned is not None
    return _finished(sampler.learned, model)


class _Learning(comfy.samplers.Sampler):
    """A host sampler that learns instead of sampling. One object for one run: it keeps what was learnt so far."""

    def __init__(self, task: LearningTask, saliency: Tensor, levels: Tensor) -> None:
        self.task, self.saliency, self.levels = task, saliency, levels
        self.learned: Learned | None = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        task = self.task
        bar, left = tqdm(disable=disable_pbar, total=task.settings.steps), TimeLeft()

        def report(state: dict) -> None:
            self.learned = state["learned"]
            bar.set_postfix(loss=f"{state['loss']:.4f}", best=f"{min(self.learned.judged.values()):.4f}", refresh=False)
            bar.update(1)
            left.update(state["i"] + 1, state["total"])
            # As the host's samplers call it: its previewers are not made for gradients.
            with torch.inference_mode():
                callback(state["i"], state["denoised"], state["x"][:1], state["total"])

        # The pseudo-word is learnt from the model as it is: what is patched onto its attention (IPAdapter, SCSA) would
        # explain the picture in its place.
        options = extra_call_options(extra_args["model_options"])
        blocks = self._choice(model_wrap, noise.device).blocks
        with bar, differentiable(model_wrap.model_patcher, options, checkpointing=blocks) as own:
            start = ordinary(task.prompt.start)
            clean, saliency, levels = (ordinary(t.to(noise.device)) for t in (latent_image, self.saliency, self.levels))
            self.learned = learn(
                _Predict(model_wrap, own),
                task.prompt.conditioning,
                start,
                clean,
                saliency,
                levels,
                task.settings,
                report,
            )
        return latent_image

    def _choice(self, guider: Any, device: torch.device) -> Choice:
        """Which blocks to checkpoint; raises MemoryError where a step of the learning would not fit."""
        task, inner = self.task, guider.inner_model
        tokens = max(map(tokens_of, guider.conds["positive"]))
        size = (task.latent.shape[-2], task.latent.shape[-1])
        call = Call(task.settings.batch, size, computed_in(inner), device, tokens, to_prompt=True)
        parts = graph_parts(inner.diffusion_model, call)
        kept = text_bytes(task.prompt.clip.cond_stage_model, tokens)
        settings: dict[str, Any] = {"always": task.checkpointing, "what": "a step of the learning"}
        return choose_for(guider, parts, kept, 0, device, **settings)


class _Predict:
    """The guider's model as `samplers.embedding` calls it: one prompt, no guidance."""

    def __init__(self, guider: Any, model_options: dict[str, Any]) -> None:
        self.guider, self.model_options = guider, model_options
        self.dtype = computed_in(guider.inner_model)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: list) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        conds = stream_conds(self.guider, conditioning, x)
        options = comfy.model_patcher.create_model_options_clone(self.model_options)
        return comfy.samplers.calc_cond_batch(self.guider.inner_model, [conds], x, sigma, options)[0]


def _finished(learned: Learned, model: "ModelPatcher") -> Learned:
    """Off the device, pictures in the host's coordinates."""
    process_out = model.get_model_object("latent_format").process_out
    with torch.inference_mode(False):
        pictures = {n: process_out(getattr(learned, n).detach()[None].cpu().clone())[0] for n in ("before", "after")}
        vectors = {k: v.detach().to("cpu", torch.float32).clone() for k, v in learned.vectors.items()}
        return replace(learned, vectors=vectors, **pictures)


def tell(learned: Learned) -> None:
    """One line about the run, and a warning where it found nothing better than the class word."""
    logging.info("Spin's embedding: %s", summary(learned))
    if learned.step == 0:
        logging.warning(
            "Semantic Style: nothing better than the class word was found; try another learning rate, more steps or "
            "a larger batch"
        )


def summary(learned: Learned) -> str:
    """One line: how much the loss on the fixed levels and noises fell."""
    before, best = learned.judged[0], min(learned.judged.values())
    return (
        f"{len(learned.losses)} steps, best after {learned.step}: masked loss {best:.5f}, with the class word "
        f"{before:.5f} ({best / before - 1:+.1%})"
    )


def latent_as_picture(model: "ModelPatcher", vae: Any, latent: Tensor) -> Tensor:
    """The first of some latents [B, C, *S] as a picture [H, W, 3] in 0..1; without a VAE roughly, as previews are."""
    latent = latent[:1]
    if vae is not None:
        decoded = vae.decode(latent)
        return decoded.reshape(-1, *decoded.shape[-3:])[0]
    latent_format = model.get_model_object("latent_format")
    inner = latent_format.process_in(latent.float().cpu())[0]
    positions = inner.reshape(inner.shape[0], -1, *inner.shape[-2:])[:, 0]
    factors = latent_format.latent_rgb_factors
    if factors is None:
        colours = positions.mean(dim=0, keepdim=True).expand(3, -1, -1)
    else:
        colours = torch.einsum("chw,cr->rhw", positions, torch.tensor(factors))
        bias = latent_format.latent_rgb_factors_bias
        colours = colours if bias is None else colours + torch.tensor(bias)[:, None, None]
    return (colours.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
