"""A small random UNet shaped like Stable Diffusion 1.5, in the host's own classes, for benchmarks and host tests."""

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from ..host.energy_guider import EnergyGuider
from ..samplers.guidance_report import GuidanceReport

CONTEXT = 64
POOLED = 1280
OUTPUT_SCALE = 0.1
SDXL_DEPTH = 10


def sd15_config(model_channels: int) -> dict[str, Any]:
    """SD1.5's UNet with narrower layers: three levels with attention at 1, 2 and 4 times the width, one without."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": model_channels,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "context_dim": CONTEXT,
        "num_heads": 4,
        "num_head_channels": -1,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }


def small_sd15(
    model_channels: int = 32,
    dtype: torch.dtype = torch.float32,
    model_type: str = "EPS",
    seed: int = 0,
    latent_format: Any = None,
    linear: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL with random weights whose predictions have the size of a trained one's.

    Args:
        model_channels: SD1.5 has 320.
        model_type: name in the host's ModelType.
        seed: of the weights.
        latent_format: the host's, SD15's when None.
        linear: linear layers around the transformers, as SD2.x has.
    """
    config = comfy.supported_models.SD15(sd15_config(model_channels) | {"use_linear_in_transformer": linear})
    config.unet_extra_config = {}
    config.latent_format = latent_format or comfy.latent_formats.SD15()
    config.set_inference_dtype(dtype, None)
    management = comfy.model_management
    offload = management.unet_offload_device()
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType[model_type], device=offload)
    fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(model.eval(), management.get_torch_device(), offload)


def conditioning(seed: int, batch: int = 1, tokens: int = 7) -> list:
    """A random CONDITIONING that fits `small_sd15`."""
    return [[torch.randn(batch, tokens, CONTEXT, generator=torch.Generator().manual_seed(seed)), {}]]


@torch.no_grad()
def fill(network: torch.nn.Module, seed: int, last: str = "out.") -> None:
    """Variance-preserving weights (the host leaves them as the memory was), with a small last layer.

    A trained model's prediction hardly depends on the noise; a random one's does, so that CFG and many steps amplify
    rounding without bound. A small output keeps the Jacobian of `denoised` near the identity.

    Args:
        last: how the names of the last layer's parameters begin.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            value = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            value *= OUTPUT_SCALE if name.startswith(last) else 1.0
        elif name.endswith(("weight", "scale")):
            value = torch.ones(parameter.shape)
        else:
            value = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(value)


def sdxl_config(model_channels: int, pooled: int = POOLED, depth: int = 3) -> dict[str, Any]:
    """SDXL's UNet with narrower and less deep layers: no attention on the finest level, two and `depth` deep below."""
    return {
        **sd15_config(model_channels),
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, depth, depth],
        "transformer_depth_middle": depth,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, depth, depth, depth],
        "use_linear_in_transformer": True,
        "num_heads": -1,
        "num_head_channels": 32,
        "num_classes": "sequential",
        "adm_in_channels": pooled + 6 * 256,
    }


def small_sdxl(
    model_channels: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pooled: int = POOLED,
    deep: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """As `small_sd15`, in SDXL's shape: its conditioning has a pooled part and the picture's size. SDXL is 320 wide and
    `deep`."""
    config = comfy.supported_models.SDXL(sdxl_config(model_channels, pooled, SDXL_DEPTH if deep else 3))
    config.latent_format = comfy.latent_formats.SDXL()
    config.set_inference_dtype(dtype, None)
    management = comfy.model_management
    offload = management.unet_offload_device()
    model = comfy.model_base.SDXL(config, comfy.model_base.ModelType.EPS, device=offload)
    fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(model.eval(), management.get_torch_device(), offload)


def pooled_conditioning(seed: int, tokens: int = 7) -> list:
    """A random CONDITIONING that fits `small_sdxl`."""
    ((tensor, _),) = conditioning(seed, tokens=tokens)
    pooled = torch.randn(1, POOLED, generator=torch.Generator().manual_seed(seed + 1000))
    return [[tensor, {"pooled_output": pooled}]]


class ReportingGuider(EnergyGuider):
    """An energy guider that keeps what its last run did, as `report`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, listen=self._keep, **settings)

    def _keep(self, report: GuidanceReport) -> None:
        self.report = report
