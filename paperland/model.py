"""The Paperland diffusion model outside the host: pixels as latents, SD's noise schedule, v-prediction, the shipped
checkpoint."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .text import CaptionEncoder
from .unet import Options, PaperlandUNet, UNetConfig

WEIGHTS = Path(__file__).parent / "weights" / "paperland.safetensors"
FORMAT = "paperland-2"
PATCH = 4  # pixels of a latent place's side
LATENT_CHANNELS = 3 * PATCH * PATCH
# Standard deviation of a patch's cosine coefficients over many scenes, by vertical and horizontal frequency.
SPREAD = (
    (1.69, 0.44, 0.17, 0.09),
    (0.44, 0.21, 0.115, 0.064),
    (0.17, 0.115, 0.085, 0.055),
    (0.09, 0.064, 0.055, 0.044),
)
WHITENING = 0.75  # exponent: 0 leaves the coefficients as they are, 1 gives all the same deviation
TIMESTEPS = 1000
BETA_RANGE = (0.00085, 0.012)


def basis() -> Tensor:
    """[16, 16]: a patch's pixels to the coefficients of its cosine transform, each over `SPREAD ** WHITENING`.

    In pixels, noise that hides the colours of a landscape has long drowned its edges and textures. In these
    coordinates, as in the latents of an autoencoder, coarse and fine content are lost at levels that are less far
    apart, and what noise a sampler leaves behind is too small to be seen.
    """
    k = torch.arange(PATCH, dtype=torch.float64)
    cosines = torch.cos(math.pi * (k + 0.5) * k[:, None] / PATCH) * math.sqrt(2 / PATCH)
    cosines[0] /= math.sqrt(2)
    scale = torch.tensor(SPREAD, dtype=torch.float64) ** -WHITENING
    return (scale.flatten()[:, None] * torch.kron(cosines, cosines)).float()


def _mix(latents: Tensor, matrix: Tensor) -> Tensor:
    channels = rearrange(latents, "b (c k) h w -> b c k h w", c=3)
    return rearrange(torch.einsum("jk,bckhw->bcjhw", matrix.to(latents), channels), "b c j h w -> b (c j) h w")


def encode_pixels(images: Tensor) -> Tensor:
    """Images [B, H, W, 3] in 0..1 to latents [B, 48, H/4, W/4], exactly: the 4x4 patches in the coordinates of
    `basis`, red before green before blue. Sides are cut to multiples of 4 (centred)."""
    h, w = (n // PATCH * PATCH for n in images.shape[1:3])
    if not h or not w:
        raise ValueError(f"images are {images.shape[2]}x{images.shape[1]} pixels; at least {PATCH}x{PATCH} are needed")
    top, left = (images.shape[1] - h) // 2, (images.shape[2] - w) // 2
    patches = rearrange(
        images[:, top : top + h, left : left + w, :3], "b (h p) (w q) c -> b (c p q) h w", p=PATCH, q=PATCH
    )
    return _mix(patches * 2 - 1, basis())


def decode_pixels(latents: Tensor) -> Tensor:
    """Latents [B, 48, h, w] to images [B, 4h, 4w, 3], clamped to 0..1."""
    patches = _mix(latents, torch.linalg.inv(basis()))
    pixels = rearrange(patches, "b (c p q) h w -> b (h p) (w q) c", p=PATCH, q=PATCH, c=3)
    return ((pixels + 1) / 2).clamp(0, 1)


def preview_factors() -> Tensor:
    """[48, 3]: latent channels to RGB in -1..1, the mean over a patch (for the host's latent previews)."""
    mean = torch.linalg.inv(basis()).mean(dim=0)
    return torch.kron(torch.eye(3), mean[:, None])


def schedule() -> Tensor:
    """Sigma of every training timestep of SD's scaled-linear schedule, [1000], rising."""
    low, high = (b**0.5 for b in BETA_RANGE)
    alpha_bar = torch.cumprod(1 - torch.linspace(low, high, TIMESTEPS, dtype=torch.float64) ** 2, dim=0)
    return ((1 - alpha_bar) / alpha_bar).sqrt().float()


def sigmas_normal(steps: int) -> Tensor:
    """The host's "normal" scheduler: `steps` levels at evenly spaced timesteps, then 0. [steps + 1], falling."""
    log_sigmas = schedule().log()
    t = torch.linspace(TIMESTEPS - 1, 0, steps)
    low = t.floor().long()
    high = (low + 1).clamp_max(TIMESTEPS - 1)
    levels = torch.lerp(log_sigmas[low], log_sigmas[high], t - low).exp()
    return torch.cat([levels, torch.zeros(1)])


class Paperland(nn.Module):
    """UNet, caption encoder and schedule as a denoiser in the k-diffusion contract: `model(x, sigma, context=...) ->
    denoised`."""

    sigmas: Tensor

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        config = config or UNetConfig()
        self.unet = PaperlandUNet(config)
        self.text = CaptionEncoder(config.context_channels)
        self.register_buffer("sigmas", schedule(), persistent=False)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The training timestep whose noise level is nearest (in log sigma): [B] -> [B]."""
        distance = (sigma.log()[:, None] - self.sigmas.log()[None, :]).abs()
        return distance.argmin(dim=1).to(sigma.dtype)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, transformer_options: Options | None = None) -> Tensor:
        """Denoised latents.

        Args:
            x: [B, 48, h, w] = clean + sigma * noise, clean being `encode_pixels(...)`.
            sigma: [B], noise level.
            context: [B or 1, tokens, channels] from `self.text`.
            transformer_options: hooks, see `PaperlandUNet.forward`.

        Returns:
            [B, 48, h, w].
        """
        s = sigma.view(-1, 1, 1, 1)
        norm = (1 + s * s).sqrt()
        z = x / norm
        v = self.unet(z, self.timestep(sigma), context.expand(len(x), -1, -1), transformer_options).to(x.dtype)
        return z / norm - v * s / norm

    def guided(
        self, positive: Tensor, negative: Tensor, cfg: float, transformer_options: Options | None = None
    ) -> "Guided":
        """A denoiser with classifier-free guidance: `u + cfg * (c - u)`; both branches run as one batch, c first."""
        return Guided(self, positive, negative, cfg, transformer_options)


class Guided:
    """`model(x, sigma) -> denoised` under classifier-free guidance; see `Paperland.guided`."""

    def __init__(
        self, model: Paperland, positive: Tensor, negative: Tensor, cfg: float, options: Options | None
    ) -> None:
        self.model, self.cfg, self.options = model, cfg, options
        self.positive, self.negative = positive, negative

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        def rows(context: Tensor) -> Tensor:
            return context.repeat(-(-len(x) // len(context)), 1, 1)[: len(x)]

        # As the host tells patches which rows are whose: 0 the positive prompt's, 1 the negative's.
        options = {**(self.options or {}), "cond_or_uncond": [0] if self.cfg == 1.0 else [0, 1]}
        if self.cfg == 1.0:
            return self.model(x, sigma, rows(self.positive), options)
        both = torch.cat([rows(self.positive), rows(self.negative)])
        c, u = self.model(x.repeat(2, 1, 1, 1), sigma.repeat(2), both, options).chunk(2)
        return u + self.cfg * (c - u)


def save(model: Paperland, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write weights in half precision with their configuration."""
    weights = {name: w.detach().to("cpu", torch.float16).contiguous() for name, w in model.state_dict().items()}
    save_file(weights, path, {"format": FORMAT, "config": json.dumps(asdict(model.unet.config)), **(metadata or {})})


def read(path: Path = WEIGHTS) -> tuple[UNetConfig, dict[str, Tensor]]:
    """Configuration and state dict (`unet.*`, `text.*`) of a checkpoint.

    Raises:
        ValueError: the file is no Paperland checkpoint.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no Paperland checkpoint (format {metadata.get('format')!r}, expected {FORMAT!r})")
    return UNetConfig(**{k: _tuples(v) for k, v in json.loads(metadata["config"]).items()}), load_file(path)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def load(path: Path = WEIGHTS, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Paperland:
    """The trained model, in evaluation mode, its parameters frozen."""
    config, weights = read(path)
    model = Paperland(config)
    model.load_state_dict(weights)
    return model.to(device, dtype).eval().requires_grad_(False)
