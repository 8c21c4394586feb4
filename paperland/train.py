"""Train the Paperland model on scenes drawn as it goes: `python tools/run.py paperland.train --help` (see
paperland/README.md).

Every step draws its scenes, noise levels and noise from the run's seed and the step's number, so a resumed run goes
on as if it had never stopped. The learning rate is flat until the last `cooldown` steps and then falls to zero: a
run can be lengthened before that. A run that is told to stop (SIGTERM) saves its state first.
"""

import argparse
import csv
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.layers import feature_blocks
from ..regions.semantic_map import resample_labels
from ..samplers.features import FeatureTap
from . import scenes
from .model import TIMESTEPS, Paperland, decode_pixels, encode_pixels, load, save, sigmas_normal

NULL_SHARE = 0.1  # captions replaced by the empty one, for classifier-free guidance
PHRASE_DROPPED, PHRASE_BARE = 0.06, 0.08  # phrases left out, and left without their colours and texture
VALIDATION_SIGMAS = (0.1, 0.4, 1.0, 3.0, 10.0)
OBJECTS = [region for regions in scenes.OBJECTS.values() for region in regions]


@dataclass(frozen=True)
class TrainingSettings:
    out: Path
    start: Path | None
    optimizer: str
    steps: int
    batch: int
    lr: float
    warmup: int
    cooldown: int
    weight_sigma: float
    object_weight: float
    label_weight: float
    ema: float
    seed: int
    device: str
    save_every: int
    sheet_every: int


def thin(caption: str, rng: random.Random) -> str:
    """A caption with some phrases, or their colours and textures, left out, as users leave them out."""
    if rng.random() < NULL_SHARE:
        return ""
    phrases = []
    for phrase in caption.split(", "):
        draw = rng.random()
        if draw < PHRASE_DROPPED:
            continue
        phrases.append(phrase.rsplit(" ", 1)[-1] if draw < PHRASE_DROPPED + PHRASE_BARE else phrase)
    rng.shuffle(phrases)
    return ", ".join(phrases)


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        clean, noise: latents [B, 48, 32, 32]. labels: [B, 128, 128]. captions: B of them. timesteps: [B].
    """

    clean: Tensor
    noise: Tensor
    labels: Tensor
    captions: list[str]
    timesteps: Tensor


def batch_of(step: int, settings: TrainingSettings) -> Batch:
    """The batch of one step, from the run's seed and the step's number."""
    g = scenes.seeded(settings.seed * 1_000_003 + step, settings.device)
    drawn = scenes.draw(scenes.sample_layouts(settings.batch, g), scenes.sample_styles(settings.batch, g))
    clean = encode_pixels(drawn.images)
    rng = random.Random(settings.seed * 1_000_003 + step)
    offset = torch.rand(1, generator=g, device=g.device)
    spread = (torch.arange(settings.batch, device=g.device) + offset) / settings.batch  # even over every batch's levels
    timesteps = (spread * TIMESTEPS).long().clamp_max(TIMESTEPS - 1)
    noise = torch.randn(clean.shape, generator=g, device=g.device)
    return Batch(clean, noise, drawn.labels, [thin(c, rng) for c in drawn.captions], timesteps)


class LabelHeads(nn.Module):
    """Region logits from decoder features, one linear head for each stage; they take part in training only.

    With them the features are supervised: that regions can be told apart in them is then what they were taught.
    """

    def __init__(self, model: Paperland) -> None:
        super().__init__()
        self.blocks = feature_blocks(model.unet)
        widths = [model.unet.output_blocks[b - 1][-1].conv.out_channels for b in self.blocks]
        self.heads = nn.ModuleList(nn.Conv2d(width, len(scenes.REGIONS), 1) for width in widths)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Logits [B, regions, h, w] of features [B, C, h, w], of which only the direction counts."""
        rows = zip(self.heads, features, strict=True)
        return [head(F.normalize(f.float(), dim=1) * f.shape[1] ** 0.5) for head, f in rows]


def losses_of(model: Paperland, heads: LabelHeads, step: int, settings: TrainingSettings) -> tuple[Tensor, Tensor]:
    """Weighted error of the predicted v, and of the labels that the heads read from the decoder's features.

    The weight sigma^2 / (sigma^2 + c^2) takes from the lowest levels, where v is little but the noise itself: c = 0
    is the plain v loss, c = 1 the loss of the denoised picture. Objects weigh more by the `object_weight`, the less
    the more noise there is: a weight that depends on what cannot be seen would bias what the model guesses.
    """
    batch = batch_of(step, settings)
    sigma = model.sigmas[batch.timesteps].view(-1, 1, 1, 1)
    a, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    tap = FeatureTap(heads.blocks)
    with torch.autocast(batch.clean.device.type, torch.bfloat16):
        context = model.text(batch.captions)
        v = model.unet(a * batch.clean + s * batch.noise, batch.timesteps.float(), context, tap.options())

    def importance(labels: Tensor) -> Tensor:
        objects = torch.isin(labels, labels.new_tensor(OBJECTS))
        weights = 1 + settings.object_weight * a[:, 0] ** 2 * objects
        return weights / weights.mean(dim=(1, 2), keepdim=True)

    error = (v.float() - (a * batch.noise - s * batch.clean)).square().mean(dim=1)
    error = (error * importance(resample_labels(batch.labels, tuple(error.shape[1:])))).mean(dim=(1, 2))
    weight = (sigma**2 / (sigma**2 + settings.weight_sigma**2)).flatten()
    read = torch.zeros_like(error)
    if settings.label_weight:
        for logits in heads([tap.features[b] for b in tap.blocks]):
            labels = resample_labels(batch.labels, tuple(logits.shape[2:]))
            wrong = F.cross_entropy(logits, labels, reduction="none") * importance(labels)
            read = read + a.flatten() * wrong.mean(dim=(1, 2))
    return (weight * error).mean(), read.mean()


def learning_rate(step: int, settings: TrainingSettings) -> float:
    rise = min(1.0, (step + 1) / max(1, settings.warmup))
    fall = min(1.0, (settings.steps - step) / max(1, settings.cooldown))
    return settings.lr * rise * fall


@torch.no_grad()
def validate(model: Paperland, device: str, count: int = 24) -> dict[str, float]:
    """Root mean square error of the denoised latents (model scale) of fixed unseen scenes, per noise level."""
    g = scenes.seeded(987_654_321, device)
    drawn = scenes.draw(scenes.sample_layouts(count, g), scenes.sample_styles(count, g))
    clean = encode_pixels(drawn.images)
    noise = torch.randn(clean.shape, generator=g, device=g.device)
    context = model.text(drawn.captions)
    return {
        f"rmse_{sigma:g}": (model(clean + sigma * noise, clean.new_full((count,), sigma), context) - clean)
        .square()
        .mean()
        .sqrt()
        .item()
        for sigma in VALIDATION_SIGMAS
    }


@torch.no_grad()
def sample(
    model: Paperland, captions: list[str], steps: int = 24, cfg: float = 3.0, seed: int = 1, size: int = 32
) -> Tensor:
    """Images [B, H, W, 3] of captions by ancestral DDPM steps from noise."""
    device = model.sigmas.device
    g = torch.Generator().manual_seed(seed)
    levels = sigmas_normal(steps).to(device)
    guided = model.guided(model.text(captions), model.text([""]), cfg)
    shape = (len(captions), model.unet.config.channels_in, size, size)
    x = torch.randn(shape, generator=g).to(device) * (1 + levels[0] ** 2).sqrt()
    for s, s_next in pairwise(levels):
        denoised = guided(x, s.expand(len(x)))
        up = (s_next**2 * (s**2 - s_next**2) / s**2).sqrt()
        x = denoised + s_next**2 / s * (x - denoised) / s + up * torch.randn(shape, generator=g).to(device)
    return decode_pixels(x)


def write_sheet(model: Paperland, path: Path, count: int = 8) -> None:
    """Samples (above) of the captions of unseen scenes (below)."""
    from PIL import Image

    g = scenes.seeded(55_555)
    drawn = scenes.draw(scenes.sample_layouts(count, g), scenes.sample_styles(count, g))
    made = sample(model, drawn.captions).cpu()
    rows = torch.cat([torch.cat(list(images), dim=1) for images in (made, drawn.images)])
    Image.fromarray((rows * 255).round().byte().numpy()).save(path)


def started(settings: TrainingSettings) -> Paperland:
    """The model before its first step: that of a checkpoint, or a new one whose residual branches add nothing."""
    if settings.start:
        return load(settings.start, settings.device).requires_grad_(True).train()
    torch.manual_seed(settings.seed)
    model = Paperland().to(settings.device)
    for block in model.unet.modules():
        if hasattr(block, "out_layers"):
            torch.nn.init.zeros_(block.out_layers[-1].weight)
        if hasattr(block, "proj_out"):
            torch.nn.init.zeros_(block.proj_out.weight)
    return model


def optimizers_of(model: Paperland, heads: LabelHeads, name: str) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon ("muon") for the UNet's inner weights and AdamW for the rest."""
    inner: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    others = list(heads.parameters())
    for key, p in model.named_parameters():
        outer = not key.startswith("unet.") or key.startswith(("unet.input_blocks.0.", "unet.out."))
        (vectors if p.ndim <= 1 else others if outer or name == "adamw" else inner).append(p)
    groups = [{"params": others, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    if not inner:
        return [adamw]
    from .muon import Muon  # asks for PyTorch 2.9

    return [adamw, Muon(inner)]


@contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """Signals to end (SIGTERM) that came inside; they end nothing by themselves."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def train(settings: TrainingSettings) -> None:
    """Run or resume a training; the state, the log, the sheets and the checkpoint are written into `settings.out`."""
    settings.out.mkdir(parents=True, exist_ok=True)
    model = started(settings)
    averaged = Paperland(model.unet.config).to(settings.device).requires_grad_(False)
    averaged.load_state_dict(model.state_dict())
    torch.manual_seed(settings.seed)
    heads = LabelHeads(model).to(settings.device)
    optimizers = optimizers_of(model, heads, settings.optimizer)
    state_path, first = settings.out / "state.pt", 0
    if state_path.exists():
        state = torch.load(state_path, map_location=settings.device, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        heads.load_state_dict(state["heads"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first = state["step"]

    def keep(step: int) -> None:
        partial = state_path.with_suffix(".new")
        torch.save(
            {
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "heads": heads.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
            },
            partial,
        )
        partial.replace(state_path)
        save(averaged, settings.out / "paperland.safetensors", {"steps": str(step), "batch": str(settings.batch)})

    with told_to_stop() as stops:
        running, read, since = 0.0, 0.0, time.perf_counter()
        for step in range(first, settings.steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, settings)
            loss, label_loss = losses_of(model, heads, step, settings)
            (loss + settings.label_weight * label_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            decay = min(settings.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
                    mean.lerp_(value, 1 - decay)
            running += loss.item()
            read += label_loss.item()
            done = step + 1
            if done % 50 == 0:
                rate = 50 * settings.batch / (time.perf_counter() - since)
                losses = {"loss": f"{running / 50:.5f}", "labels": f"{read / 50:.5f}"}
                row = {"step": done, **losses, "images_per_second": f"{rate:.1f}"}
                write_row(settings.out / "log.csv", row)
                print(row, flush=True)
                running, read, since = 0.0, 0.0, time.perf_counter()
            last = done == settings.steps
            if done % settings.save_every == 0 or last or stops:
                keep(done)
            if stops:
                return
            if done % settings.sheet_every == 0 or last:
                figures = validate(averaged, settings.device)
                write_row(
                    settings.out / "validation.csv", {"step": done, **{k: f"{v:.5f}" for k, v in figures.items()}}
                )
                print(done, figures, flush=True)
                write_sheet(averaged, settings.out / f"sheet_{done:06d}.png")
                since = time.perf_counter()


def write_row(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "runs" / "paperland", help="folder of the run"
    )
    parser.add_argument("--start", type=Path, help="checkpoint whose weights a new run begins with")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps over which the learning rate rises")
    parser.add_argument(
        "--cooldown", type=int, default=4000, help="last steps, over which the learning rate falls to zero"
    )
    parser.add_argument("--weight-sigma", type=float, default=0.2, help="c of the loss weight: see losses_of")
    parser.add_argument("--object-weight", type=float, default=2.0, help="what suns, trees and houses weigh more")
    parser.add_argument("--label-weight", type=float, default=0.0, help="of the region labels read from features")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--sheet-every", type=int, default=500)
    train(TrainingSettings(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
