"""The host's GUIDER with an energy: Semantix (He et al., ICLR 2025) for SamplerCustomAdvanced with any sampler."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ..attention.layers import cross_attention_layers, feature_blocks
from ..samplers.features import FeatureTap
from ..samplers.finite import FiniteWatch
from ..samplers.guidance import clamped, energy_gradient, step_of, with_guidance
from ..samplers.guidance_report import GuidanceReport
from ..samplers.terms import Energy, Key, Resampled, Stream, Term, active_terms
from .conditioning import active_at, of_areas, tokens_of
from .extra_calls import leave_step_caches
from .gradient_memory import Call, Choice, choose_for, energy_bytes, graph_parts
from .gradients import constant_controls, differentiable, ordinary
from .graph_memory import GraphMemory
from .levels import levels_of, saying_level
from .model_sampling import check_unet
from .models import check_same, computed_in, identify
from .progress import with_time_left
from .reference_cache import CACHE, ReferenceCache
from .references import References
from .replay_sampler import ReplaySampler
from .versions import without_clones
from .windows import window_of_call

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

WRAPPER = "semantic_style_energy"


class EnergyGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance and an energy. Settings only; what a run knows lives in the run.

    Args:
        model: the host's MODEL, used as it is and given back as it was.
        positive, negative: the host's CONDITIONING; negative is not evaluated at cfg 1.
        energy: see `samplers.guidance`; its streams' conditioning are CONDITIONING or None.
        checkpointing: less memory for the gradient, more time: of all blocks, or of as few as make a step fit.
        allow_other_model: references may have been inverted with another checkpoint of the same structure.
        every: the gradient is made in the first step at which the energy acts and in every n-th after it; the steps
            between are guided by the last one.
        cache: of reference features, None for none.
        listen: called with what a run's guidance did, at its end, also when it failed or was cancelled.
    """

    def __init__(
        self,
        model: "ModelPatcher",
        positive: list,
        negative: list,
        cfg: float,
        energy: Energy,
        *,
        checkpointing: bool = False,
        allow_other_model: bool = False,
        every: int = 1,
        cache: ReferenceCache | None = CACHE,
        listen: Callable[[GuidanceReport], None] | None = None,
    ) -> None:
        super().__init__(model)
        self.set_conds(positive, negative)
        self.set_cfg(cfg)
        self.energy = energy
        self.checkpointing = checkpointing
        self.allow_other_model = allow_other_model
        self.every = every
        self.cache = cache
        self.listen = listen
        self._run: _GuidedRun | None = None

    def sample(self, noise: Tensor, latent_image: Tensor, sampler: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the host's; says the time left where the sampler does not."""
        if kwargs.get("callback") is not None and not isinstance(sampler, ReplaySampler):
            kwargs["callback"] = with_time_left(kwargs["callback"])
        return super().sample(noise, latent_image, sampler, *args, **kwargs)

    def outer_sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As the host's; raises ValueError before anything is loaded when model, energy, prompts and latent do not
        fit.
        """
        check_energy(self.model_patcher, self.energy, noise.shape, self.allow_other_model)
        check_prompts(self.original_conds.get("positive", ()))
        report = GuidanceReport(notes=notes(self.energy, noise.shape))
        self._run = _GuidedRun(self, report, sigmas.tolist())
        leave_step_caches(self)
        try:
            samples = super().outer_sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
            self._run.watch.finish()
        except FloatingPointError:
            # What is not finite in the guidance is so in all that comes of it.
            self._run.watch.finish()
            raise
        finally:
            run, self._run = self._run, None
            run.finish()
            if self.listen is not None:
                self.listen(report)
        try:
            _tell(report, self.energy)
        except Exception:
            # The picture is made; what is said about it must not lose it.
            logging.exception("Semantic Style: the report of a guided run failed")
        return samples

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        """`denoised - sigma * g`: see `samplers.guidance`. x [B, C, *S] in the model's coordinates, timestep [B]."""
        model_options = model_options or {}
        run = self._run
        assert run is not None
        level, *others = levels_of(timestep, model_options.get("transformer_options", {}))
        if any(other != level for other in others):
            raise ValueError(
                "an energy guider takes one noise level per call; use it with a sampler, not with an inversion node"
            )
        terms = active_terms(self.energy, level, self.inner_model.model_sampling.percent_to_sigma)
        prompted = bool(active_at(self.conds.get("positive") or (), level))
        if not terms or not prompted:
            run.report.plain_forwards += 1
            run.report.unprompted += bool(terms)
            return super().predict_noise(x, timestep, model_options, seed)
        if not run.guides(level):
            run.report.held += 1
            run.report.plain_forwards += 1
            assert run.held is not None
            return with_guidance(super().predict_noise(x, timestep, model_options, seed), run.held, level)
        step = _Step(run, terms, level, x)
        model_options = saying_level(model_options, timestep, level)
        # Through the host's own function, found at call time: AnimateDiff-Evolved puts its own in that place.
        denoised = comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.conds.get("negative", None),
            self.conds.get("positive", None),
            self.cfg,
            model_options=step.options(model_options),
            seed=seed,
        )
        run.held = step.guidance()
        return with_guidance(denoised, run.held, level)


class _GuidedRun:
    """What one run of a guider needs at every step; `begin` comes with the first call, when the model is loaded."""

    def __init__(self, guider: EnergyGuider, report: GuidanceReport, sigmas: list[float]) -> None:
        self.guider, self.report, self.sigmas = guider, report, sigmas
        self.resampled, self.watch = Resampled(), FiniteWatch()
        self.device: torch.device | None = None
        self.first: int | None = None
        self.held: Tensor | None = None

    def guides(self, level: float) -> bool:
        """Whether a gradient is made at a level at which terms act: in the first such step and every n-th after it."""
        step = step_of(level, self.sigmas)
        if self.first is None:
            self.first = step
        return (step - self.first) % self.guider.every == 0

    def begin(self, device: torch.device) -> None:
        if self.device is not None:
            return
        self.device, guider = device, self.guider
        unet = guider.inner_model.diffusion_model
        self.blocks, layers = feature_blocks(unet), cross_attention_layers(unet)
        self.layers = layers if any(layers) else ()
        self.attend = comfy.ldm.modules.attention.optimized_attention_masked
        self.memory = GraphMemory(unet)
        self.choices: dict[Call, Choice] = {}
        # Maps also for terms of weight 0, so that turning one up finds them in the cache.
        mapped = {t.stream.key for t in guider.energy.terms if t.needs_maps}
        streams: dict[Key, tuple[Stream, bool]] = {
            key: (stream, key in mapped and bool(self.layers)) for key, stream in guider.energy.streams.items()
        }
        self.references = References(guider, streams, self.blocks, self.layers, self.attend, guider.cache)
        self.dtype = computed_in(guider.inner_model)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def choice(self, x: Tensor, positive: list[dict[str, Any]], level: float) -> Choice:
        """Which blocks to checkpoint in a call for latents x [R, C, h, w]."""
        unet, terms = self.guider.inner_model.diffusion_model, self.guider.energy.terms
        active = active_at(positive, level)
        mapped = self.layers if any(t.needs_maps and t.weight > 0 for t in terms) else ()
        call = Call(
            rows=len(x) * max(1, len(active)),
            size=(x.shape[-2], x.shape[-1]),
            dtype=self.dtype,
            device=x.device,
            tokens=max(map(tokens_of, active), default=0),
            until=self.blocks[-1],
            maps=tuple(layer for stage in mapped for layer in stage),
        )
        if call not in self.choices:
            parts, beside = graph_parts(unet, call), energy_bytes(unet, call)
            settings: dict[str, Any] = {"always": self.guider.checkpointing, "what": "a guided step"}
            choice = choose_for(self.guider, parts, *beside, x.device, **settings)
            self.choices[call] = choice
            if choice.need >= self.report.foreseen_bytes:
                self.report.checkpointed, self.report.blocks = len(choice.blocks), choice.total
                self.report.foreseen_bytes = choice.need
        return self.choices[call]

    def finish(self) -> None:
        """Enter what is known at the end only."""
        if self.device is None:
            return
        self.report.reference_forwards = self.references.forwards
        self.report.reference_reused = self.references.reused
        self.report.cache_bytes = 0 if self.references.cache is None else self.references.cache.bytes
        self.report.graph_bytes = self.memory.bytes
        if self.device.type == "cuda":
            self.report.peak_bytes = torch.cuda.max_memory_allocated(self.device)


class _Step:
    """One guided prediction: a wrapper around the host's calls of the model, one for each context window."""

    def __init__(self, run: _GuidedRun, terms: tuple[Term, ...], level: float, x: Tensor) -> None:
        run.begin(x.device)
        self.run, self.terms, self.level = run, terms, level
        self.gradient = torch.zeros_like(x)
        self.windows = x.new_zeros(len(x))
        self.energies: list[tuple[dict[str, Tensor], int]] = []

    def options(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """The step's options with this wrapper innermost, inside of those that cut a clip into windows."""
        options = without_clones(comfy.model_patcher.create_model_options_clone(model_options))
        kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
        to = options.setdefault("transformer_options", {})
        wrappers = {k: dict(v) for k, v in to.get("wrappers", {}).items()}
        wrappers[kind] = {**wrappers.get(kind, {}), WRAPPER: [self]}
        to["wrappers"] = wrappers
        return options

    def __call__(
        self,
        executor: Callable,
        model: Any,
        conds: list,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> list[Tensor]:
        """CALC_COND_BATCH: the conditional branch with gradient, the other without."""
        # Guidance methods that hang on the CFG function make calls of their own, of one condition.
        if len(conds) != 2 or conds[0] is None:
            return executor(model, conds, x, timestep, model_options, *args, **kwargs)
        run, report = self.run, self.run.report
        comfy.model_management.throw_exception_if_processing_interrupted()
        window = window_of_call(model_options.get("transformer_options", {}))
        # Before anything of the step is computed: it may not fit.
        choice = run.choice(x, conds[0], self.level)
        rows, frames, lead = (window.rows, window.frames, len(window.anchors)) if window else (None, None, 0)
        references = {
            key: {prompt: f.rows(slice(lead, None)) if f.count > 1 else f for prompt, f in of.items()}
            for key, of in run.references.at(executor, x, self.level, timestep, conds[0], model_options, rows).items()
        }
        maps = any(t.needs_maps for t in self.terms)
        tap = FeatureTap(run.blocks, run.layers if maps else None, run.attend, cut=True, leading=lead)
        with differentiable(run.guider.model_patcher, model_options, checkpointing=choice.blocks) as options:
            options["transformer_options"] = tap.options(options["transformer_options"])
            positive, sigma = ordinary(constant_controls([conds[0]])), ordinary(timestep)
            options = saying_level(options, sigma, self.level)

            def conditional(x: Tensor) -> Tensor:
                with run.memory:
                    denoised = executor(model, positive, x, sigma, options, *args, **kwargs)[0]
                comfy.model_management.throw_exception_if_processing_interrupted()
                return denoised

            denoised, gradient, energies = energy_gradient(
                ordinary(x), self.level, self.terms, conditional, tap, references, frames, run.resampled
            )
        report.gradient_forwards += 1
        report.backwards += 1
        self._add(gradient[lead:], energies, frames)
        out = [denoised, torch.zeros_like(denoised)]
        if conds[1] is not None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            # In its own place, by which patches (IPAdapter's) tell it from the conditional branch.
            out[1] = executor(model, [None, conds[1]], x, timestep, model_options, *args, **kwargs)[1]
            report.plain_forwards += 1
        return out

    def _add(self, gradient: Tensor, energies: dict[str, Tensor], frames: tuple[int, ...] | None) -> None:
        device = self.gradient.device
        every = torch.arange(len(self.gradient), device=device)
        at = every if frames is None else torch.tensor(frames).to(device, non_blocking=device.type == "cuda")
        self.gradient.index_add_(0, at, gradient.to(self.gradient))
        self.windows.index_add_(0, at, torch.ones_like(at, dtype=self.windows.dtype))
        self.energies.append((energies, len(at)))

    def guidance(self) -> Tensor:
        """The clamped mean over the windows that hold a frame; the step is entered into the report."""
        if not self.energies:
            raise RuntimeError(
                "the energies were not evaluated: something on this MODEL replaces the sampler's model calls "
                "(sampler_calc_cond_batch_function). Take that node out, or use a CFG guider"
            )
        rows = sum(n for _, n in self.energies)
        means = {
            name: torch.stack([e[name] * (n / rows) for e, n in self.energies]).sum() for name in self.energies[0][0]
        }
        weights = self.windows.clamp(min=1).reshape(-1, *[1] * (self.gradient.ndim - 1))
        report = self.run.report
        g, step = clamped(self.gradient / weights, self.level, means, len(report.steps), self.run.dtype, self.run.watch)
        report.steps.append(step)
        return g


def check_energy(model: "ModelPatcher", energy: Energy, shape: torch.Size, allow_other_model: bool) -> None:
    """Raise ValueError unless the energy's references fit the model and a latent of `shape` [B, C, *S]."""
    check_unet(model)
    feature_blocks(model.model.diffusion_model)
    if len(shape) != 4:
        raise ValueError(
            f"energies work on pictures and on clips whose frames are the batch [frames, C, H, W]; this latent is "
            f"{list(shape)}"
        )
    now = identify(model)
    for stream in energy.streams.values():
        inversion = stream.inversion
        check_same(inversion.model, now, allow_other_model)
        theirs = list(inversion.clean.shape)
        if theirs[1] != shape[1] or len(theirs) != len(shape) or theirs[0] not in (1, shape[0]):
            raise ValueError(
                f"an energy's inversion holds a latent {theirs} (batch, channels, size), the latent being made is "
                f"{list(shape)}: it needs the same channels, and one picture or as many as are being made"
            )
    for term in energy.terms:
        term.check_fits(shape)


def notes(energy: Energy, shape: torch.Size) -> list[str]:
    """What a user should know of the terms that have a weight, on latents of `shape`, each once."""
    return list(dict.fromkeys(note for term in energy.terms if term.weight > 0 for note in term.notes(tuple(shape))))


def check_prompts(positive: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError where a positive prompt (the guider's form) is for an area of the picture."""
    if of_areas(positive):
        raise ValueError(
            "energies compare whole pictures, and a positive prompt is for an area of it (Conditioning Set Area, or a "
            'mask with "mask bounds"): use Conditioning (Set Mask) with "default" instead, which limits the prompt '
            "to a part of the picture all the same"
        )


def _tell(report: GuidanceReport, energy: Energy) -> None:
    """One line about the run, and a warning where its guidance did nothing."""
    logging.info(summary(report))
    for note in report.notes:
        logging.info("Semantic Style: %s.", note)
    if reason := why_nothing(report, energy):
        logging.warning("Semantic Style: %s", reason)


def why_nothing(report: GuidanceReport, energy: Energy) -> str:
    """Why a run's guidance changed nothing, empty where it changed something."""
    if not any(t.weight > 0 for t in energy.terms):
        return "the guidance changed nothing: all weights are 0"
    if not report.steps and report.unprompted:
        return "the guidance changed nothing: no positive prompt was active at the steps where the energy acts"
    if not report.steps:
        return "the guidance changed nothing: no step of this run lies in the terms' start to end range"
    if max(report.table()["gradient"]) == 0.0:
        return (
            "the guidance changed nothing: the gradient is zero at every step. Context, reference and the picture "
            "being made may be the same, or an attention patch lets no gradient through"
        )
    return ""


def summary(report: GuidanceReport) -> str:
    """One line: steps, evaluations, memory, how hard the guidance pushed."""
    table = report.table()
    parts = [
        f"{len(report.steps)} guided steps",
        f"{report.gradient_forwards} forwards with gradient, {report.backwards} backwards",
        f"{report.plain_forwards} forwards without",
        f"{report.reference_forwards} for references ({report.reference_reused} reused)",
    ]
    if report.steps:
        mean, most = (math.fsum(table["gradient"]) / len(report.steps), max(table["saturated"]))
        parts.append(f"mean gradient {mean:.3g}, at most {most:.1%} of it clamped")
    if report.held:
        parts.append(f"{report.held} calls guided by the gradient of a step before")
    if report.unprompted:
        parts.append(f"{report.unprompted} steps not guided, since no positive prompt is active there")
    if report.cache_bytes:
        parts.append(f"{report.cache_bytes / 2**20:.0f} MB of reference features kept in RAM")
    if report.checkpointed:
        parts.append(f"{report.checkpointed} of {report.blocks} blocks checkpointed")
    if report.foreseen_bytes:
        parts.append(f"{report.foreseen_bytes / 2**20:.0f} MB foreseen for a guided step")
    if report.graph_bytes:
        parts.append(f"{report.graph_bytes / 2**20:.0f} MB kept for a backward pass")
    if report.peak_bytes:
        parts.append(f"peak memory {report.peak_bytes / 2**20:.0f} MB")
    return "Guided by energies: " + ", ".join(parts)
