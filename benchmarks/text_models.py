"""Small random text encoders in the host's own classes, with its tokenizers, for benchmarks and host tests."""

from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip
import torch

from .random_models import CONTEXT

SPREAD = 0.02  # of CLIP's token vectors
# SDXL's conditioning is the two encoders' side by side; the second one's width is that of the pooled vector.
LEFT, RIGHT = 24, 40


def _config(width: int, layers: int) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_hidden_layers": layers}
    return {"hidden_size": width, "intermediate_size": 2 * width, **heads}


def small_clip(kind: str = "sd1", layers: int = 3, seed: int = 0, folders: list[str] | None = None) -> comfy.sd.CLIP:
    """A CLIP with random weights whose conditioning fits `models.small_sd15` or, for SDXL, `models.small_sdxl` made
    with a pooled vector of `RIGHT` channels.

    Args:
        kind: "sd1", "sd2" or "sdxl".
        folders: of embeddings.
    """
    targets = {
        "sd1": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer),
        "sd2": (comfy.text_encoders.sd2_clip.SD2ClipModel, comfy.text_encoders.sd2_clip.SD2Tokenizer),
        "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
    }

    class Target:
        params: dict[str, Any] = {}
        clip, tokenizer = targets[kind]

    configs = {"clip_l": LEFT if kind == "sdxl" else CONTEXT, "clip_g": RIGHT, "clip_h": CONTEXT}
    options: dict[str, Any] = {f"{name}_model_config": _config(width, layers) for name, width in configs.items()}
    clip = comfy.sd.CLIP(Target, embedding_directory=folders, model_options={**options, "dtype": torch.float32})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in clip.cond_stage_model.named_parameters():
            if "embedding" in name:
                parameter.copy_(SPREAD * torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
            elif parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return clip
