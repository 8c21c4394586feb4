"""Small random flow models, each in the host's own class of its family, for benchmarks and host tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from .random_models import fill

CONTEXT = 32
POOLED = 32
TOKENS = 5
# Of newer versions of the host, which have no default for it.
TEXT_AXES = "txt_ids_dims"


@dataclass(frozen=True)
class Family:
    """What the host calls a family, and how small it can be.

    Attributes:
        host_class: name in comfy.supported_models.
        unet_config: of the network.
        last: how its last layer's parameters begin.
        video: whether latents are [B, C, T, H, W].
    """

    host_class: str
    unet_config: dict[str, Any]
    last: str
    video: bool = False

    @property
    def missing(self) -> bool:
        """Whether this version of the host does not have it."""
        return not hasattr(comfy.supported_models, self.host_class)


_LUMINA = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512],
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 16,
    "qk_norm": True,
    "cap_feat_dim": CONTEXT,
}

FAMILIES = {
    "SD3": Family(
        "SD3",
        {
            "in_channels": 16,
            "patch_size": 2,
            "out_channels": 16,
            "depth": 1,
            "num_blocks": 2,
            "input_size": None,
            "adm_in_channels": POOLED,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": CONTEXT, "out_features": 64},
            },
            "num_patches": 256,
            "pos_embed_max_size": 16,
            "qk_norm": "rms",
        },
        "final_layer.linear",
    ),
    "Flux": Family(
        "Flux",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": POOLED,
            "context_in_dim": CONTEXT,
            "hidden_size": 64,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [8, 12, 12],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            TEXT_AXES: [],
        },
        "final_layer.linear",
    ),
    "Qwen-Image": Family(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": CONTEXT,
            "axes_dims_rope": (8, 12, 12),
        },
        "proj_out",
        video=True,
    ),
    "Lumina2": Family("Lumina2", {"image_model": "lumina2", **_LUMINA}, "final_layer.linear"),
    "Z-Image": Family(
        "ZImage",
        {
            "image_model": "lumina2",
            **_LUMINA,
            # Its embedding of the time is that wide.
            "dim": 256,
            "n_layers": 1,
            "n_heads": 8,
            "n_kv_heads": 8,
            "axes_dims": [8, 12, 12],
            "rope_theta": 256.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        "final_layer.linear",
    ),
    "Wan": Family(
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "patch_size": (1, 2, 2),
            "in_dim": 16,
            "out_dim": 16,
            "dim": 64,
            "ffn_dim": 128,
            "freq_dim": 32,
            "text_dim": CONTEXT,
            "num_heads": 2,
            "num_layers": 2,
        },
        "head.head",
        video=True,
    ),
}


def small_flow(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of the family with random weights and a small last layer (see `fill`).

    Args:
        name: one of FAMILIES.
        seed: of the weights.
    """
    family = FAMILIES[name]
    host_class: Callable[..., Any] = getattr(comfy.supported_models, family.host_class)
    config = host_class({k: v for k, v in family.unet_config.items() if k != TEXT_AXES or _flux_has(TEXT_AXES)})
    config.set_inference_dtype(dtype, None)
    management = comfy.model_management
    offload = management.unet_offload_device()
    model = config.get_model({}, device=offload)
    fill(model.diffusion_model, seed, family.last)
    if (positions := getattr(model.diffusion_model, "pos_embed", None)) is not None:
        # A buffer that comes with the checkpoint; it is left as the memory was.
        positions.copy_(0.5 * torch.randn(positions.shape, generator=torch.Generator().manual_seed(seed)))
    return comfy.model_patcher.ModelPatcher(model.eval(), management.get_torch_device(), offload)


def _flux_has(parameter: str) -> bool:
    return parameter in comfy.ldm.flux.model.FluxParams.__dataclass_fields__


def flow_conditioning(model: comfy.model_patcher.ModelPatcher, seed: int, **options: Any) -> list:
    """A random CONDITIONING for a model of `small_flow`; `options` go beside it (guidance, reference_latents)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, TOKENS, CONTEXT, generator=generator)
    pooled = torch.randn(1, POOLED, generator=generator)
    if isinstance(model.model, comfy.model_base.Lumina2):
        options = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long), **options}
    return [[tokens, {"pooled_output": pooled, **options}]]
