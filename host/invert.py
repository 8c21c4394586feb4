"""Running an inversion through the host's own guider.

The guider loads the model, prepares conditioning, applies hooks, wrappers and CFG, and cleans up when the run ends or
fails; what is ours is the sampler object that it calls.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..samplers.ddim_inversion import ddim_inversion
from ..samplers.ddpm_inversion import ddpm_inversion, noised_path
from ..samplers.inversion import Inversion
from ..samplers.steps import FLOW, check_skip
from .batching import Parts, fits, levels_per_call, rows_together
from .extra_calls import uncached
from .levels import saying_level
from .model_sampling import check_latent_kind, path_of
from .models import check_channels, identify
from .progress import TimeLeft
from .reference_cache import ReferenceCache
from .scsa_references import ReadWhileInverting
from .windows import set_window_step

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class InversionTask:
    """What to invert and with what: the inputs that both kinds of inversion share.

    Attributes:
        model: the host's MODEL, used as it is.
        positive, negative: the host's CONDITIONING; negative is not evaluated at cfg 1.
        latent: [B, C, *S] in the host's coordinates.
        steps, scheduler: of the host's schedulers.
        cfg: guidance scale. seed: of the noise, and for models whose conditioning uses one.
        sigmas: [N+1] levels in place of the scheduler's, None for those.
        skip: noisy levels to leave out.
    """

    model: "ModelPatcher"
    positive: list
    negative: list
    latent: Tensor
    steps: int
    scheduler: str
    cfg: float
    seed: int
    sigmas: Tensor | None = None
    skip: int = 0


class HostModel:
    """A guider as the samplers see a model; ends the run before the next call when the user cancels it.

    Where the memory does not do for all rows of a call they are evaluated in parts, if the model treats them alone.

    Attributes:
        guider: the host's. sigmas: [N+1] levels of the schedule that the calls belong to. batch: pictures in a level.
        skipped: noisy steps of the schedule that `sigmas` leave out. path: that its latents are on.
    """

    def __init__(self, guider: Any, sigmas: Tensor, batch: int, skipped: int = 0) -> None:
        self.guider = guider
        self.sigmas = sigmas
        self.skipped = skipped
        self.path = path_of(guider.model_patcher)
        self.parts = Parts(rows_together(guider, batch))
        inner = guider.inner_model
        self.dtype = getattr(inner, "manual_cast_dtype", None) or inner.get_dtype()

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        # The samplers have the levels on the CPU where all rows have one.
        level = None if sigma.device != torch.device("cpu") or (sigma != sigma[0]).any() else float(sigma[0])

        def call(rows: slice) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if level is None:
                return self.guider(x[rows], sigma[rows], **extra_args)
            timestep = x.new_full((len(x[rows]),), level)
            options = saying_level(extra_args.get("model_options", {}), timestep, level)
            return self.guider(x[rows], timestep, **{**extra_args, "model_options": options})

        set_window_step(extra_args.get("model_options", {}), self.sigmas, sigma, self.skipped)
        parts = self.parts(len(x), call)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def make_sigmas(model: "ModelPatcher", scheduler: str, steps: int) -> Tensor:
    """The scheduler's noise levels [N+1] for this model, strictly decreasing; N may differ from `steps`.

    Levels that repeat (some schedulers do that at many steps) are left out, they would be steps that do nothing.

    Raises:
        ValueError: an unknown scheduler, no steps, or a scheduler that has no levels for this model and number of
        steps.
    """
    if scheduler not in comfy.samplers.SCHEDULER_NAMES:
        raise ValueError(
            f"there is no scheduler {scheduler!r}; choose one of {', '.join(comfy.samplers.SCHEDULER_NAMES)}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    failed = f"the scheduler {scheduler} has no usable noise levels for {steps} steps with this model; choose another"
    try:
        sigmas = (
            comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps).float().cpu()
        )
        if path_of(model) == FLOW:
            # Schedulers that go through logarithms or fits miss it by rounding.
            sigmas = sigmas.clamp(max=1.0)
    except (ArithmeticError, IndexError) as error:
        raise ValueError(f"{failed} ({error})") from error
    sigmas = torch.unique_consecutive(sigmas)
    if len(sigmas) < 2 or not torch.isfinite(sigmas).all() or (sigmas.diff() >= 0).any():
        raise ValueError(failed)
    if len(sigmas) - 1 != steps:
        logging.info("The scheduler %s makes %d steps where %d were asked for.", scheduler, len(sigmas) - 1, steps)
    return sigmas


def invert_ddpm(
    task: InversionTask,
    batch_steps: int = 0,
    keep_residual: bool = True,
    same_noise: bool = False,
    noise_maps: bool = True,
) -> Inversion:
    """Edit-friendly DDPM inversion through the host (see `samplers.ddpm_inversion`), on the CPU when done.

    Args:
        batch_steps: noise levels per model call; 0 chooses by free memory and device.
        same_noise: all pictures of the batch get one noise, so that edits of a video's frames differ less.
        noise_maps: False asks no model and makes an inversion that is good as a reference only (see
            `samplers.ddpm_inversion.noised_path`): with the same latents, without what a replay needs.
    Raises:
        ValueError: a model, latent or setting that cannot be inverted, before any model call.
        FloatingPointError: a prediction that is not finite.
    """
    if batch_steps < 0:
        raise ValueError(f"batch_steps must be 0 (automatic) or more, got {batch_steps}")

    def settings(path: str, clean: Tensor, n: int) -> dict[str, Any]:
        common: dict[str, Any] = {"path": path, "seed": task.seed, "skip": task.skip}
        if same_noise:
            generator = torch.Generator("cpu").manual_seed(task.seed)
            one = torch.randn((n, 1, *clean.shape[1:]), generator=generator, dtype=clean.dtype)
            common["noise"] = one.expand(n, *clean.shape)
        return common

    def run(model: HostModel, clean: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable) -> Inversion:
        n = len(sigmas) - 1
        asked = settings(model.path, clean, n)
        asked["batch_steps"] = levels_per_call(model.guider, clean, n - task.skip, batch_steps)
        asked["store"] = _store(model.guider, clean, 2 * n)
        asked.update(keep_residual=keep_residual, extra_args=extra_args, callback=callback)
        return ddpm_inversion(model, clean, sigmas, **asked)

    if noise_maps:
        return _run(task, run, calls_per_step=1)
    latent, sigmas = _prepare(task)
    scale, shift = _to_host(task.model, latent)
    # As the host's guiders do: zeros stay zeros.
    clean = task.model.get_model_object("latent_format").process_in(latent) if latent.any() else latent
    path = noised_path(clean, sigmas, **settings(path_of(task.model), clean, len(sigmas) - 1))
    return _finish(path, task, scale, shift)


def invert_ddim(task: InversionTask, refine: int = 0, cache: ReferenceCache | None = None) -> Inversion:
    """DDIM inversion through the host (see `samplers.ddim_inversion`), on the CPU when done.

    Args:
        cache: keeps what SCSA will ask for, read on the way (see `scsa_references`); None for none.
    Raises:
        ValueError: a model, latent or setting that cannot be inverted, before any model call.
        FloatingPointError: a prediction that is not finite.
    """
    if refine < 0:
        raise ValueError(f"refine must be 0 or more, got {refine}")
    if refine and task.cfg > 1.0:
        logging.warning("DDIM refinement does not converge with guidance (CFG %g): use CFG 1 with it.", task.cfg)

    reading = None if cache is None else ReadWhileInverting(cache)

    def run(model: HostModel, clean: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable) -> Inversion:
        settings: dict[str, Any] = {"path": model.path, "skip": task.skip, "refine": refine}
        settings["store"] = _store(model.guider, clean, len(sigmas))
        read = model if reading is None else reading.around(model.guider, model)
        return ddim_inversion(read, clean, sigmas, extra_args=extra_args, callback=callback, **settings)

    inversion = _run(task, run, calls_per_step=1 + refine)
    if reading is not None:
        reading.finish(inversion)
    return inversion


def _store(guider: Any, clean: Tensor, copies: int) -> torch.device | None:
    """Where an inversion of so many latents is kept while it is made: beside the picture, or where there is room."""
    return None if fits(guider, clean, copies) else comfy.model_management.intermediate_device()


class InversionSampler(comfy.samplers.Sampler):
    """A host sampler that inverts instead of sampling. One object for one run: it keeps the run's result."""

    def __init__(self, run: Callable[..., Inversion]) -> None:
        self.run = run
        self.result: Inversion | None = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        bar, left = tqdm(disable=disable_pbar), TimeLeft()

        def report(state: dict) -> None:
            bar.total = state["total"]
            bar.update(state["i"] + 1 - bar.n)
            left.update(state["i"] + 1, state["total"])
            callback(state["i"], state["denoised"], state["x"], state["total"])

        with bar:
            self.result = self.run(
                HostModel(model_wrap, sigmas, len(latent_image)), latent_image, sigmas, extra_args, report
            )
        return latent_image


def _prepare(task: InversionTask) -> tuple[Tensor, Tensor]:
    """The latent in the host's coordinates, and the levels [N+1]; ValueError where they do not do."""
    path_of(task.model)
    check_latent_kind(task.latent)
    latent = comfy.sample.fix_empty_latent_channels(task.model, task.latent)
    check_channels(task.model, latent)
    sigmas = make_sigmas(task.model, task.scheduler, task.steps) if task.sigmas is None else task.sigmas.cpu()
    check_skip(task.skip, len(sigmas) - 1)
    return latent.float(), sigmas


def _run(task: InversionTask, run: Callable[..., Inversion], calls_per_step: int) -> Inversion:
    latent, sigmas = _prepare(task)
    guider = comfy.samplers.CFGGuider(uncached(task.model))
    guider.set_conds(task.positive, task.negative)
    guider.set_cfg(task.cfg)
    sampler = InversionSampler(run)
    callback = latent_preview.prepare_callback(task.model, (len(sigmas) - 1 - task.skip) * calls_per_step)
    scale, shift = _to_host(task.model, latent)
    guider.sample(
        # The samplers draw their own noise; the host wants a tensor of its shape.
        torch.zeros_like(latent),
        latent,
        sampler,
        sigmas,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=task.seed,
    )
    assert sampler.result is not None
    return _finish(sampler.result, task, scale, shift)


def _to_host(model: "ModelPatcher", latent: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] from the model's latents to the host's: its latent formats are affine maps of each channel.

    Raises:
        ValueError: this one is not.
    """
    process_out = model.get_model_object("latent_format").process_out
    one = torch.ones_like(latent[:1]).cpu()
    shift = process_out(torch.zeros_like(one))
    scale = process_out(one) - shift
    if shift.shape != one.shape or not torch.allclose(process_out(-3 * one), shift - 3 * scale, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"the latent format {type(model.get_model_object('latent_format')).__name__} is more than a scale and a "
            "shift of each channel; models with such latents cannot be inverted"
        )
    return scale.flatten(2)[0, :, 0], shift.flatten(2)[0, :, 0]


def _finish(inversion: Inversion, task: InversionTask, scale: Tensor, shift: Tensor) -> Inversion:
    """The result with what only the host knows, off the device."""
    known = {
        "cfg": float(task.cfg),
        "seed": task.seed,
        "latent_format": type(task.model.get_model_object("latent_format")).__name__,
        "scale": scale,
        "shift": shift,
        "model": identify(task.model),
        "positive": task.positive,
        "negative": task.negative,
    }
    device = comfy.model_management.intermediate_device()
    # Nodes run in inference mode, whose tensors no gradient can pass; a value that lives on in the graph must be
    # ordinary.
    with torch.inference_mode(False):
        parts = {f.name: getattr(inversion, f.name) for f in fields(inversion)} | known
        parts = {name: v.to(device).clone() if isinstance(v, Tensor) else v for name, v in parts.items()}
        return replace(inversion, **parts)
