"""Small models of our own as the host's MODEL, CLIP and VAE, so that stock nodes work on them."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import folder_paths
import torch
from torch import Tensor, nn

from ..files.embedding_file import take_embeddings

KEY = "emb_params"  # of embeddings in files
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class _OwnUNet(comfy.supported_models.SD15):
    unet_extra_config: dict[str, Any] = {}  # SD1.5's own would overrule the number of heads


def _latent_format(name: str, channels: int, rgb_factors: Tensor) -> comfy.latent_formats.LatentFormat:
    def init(self: Any) -> None:
        self.latent_channels = channels
        self.latent_rgb_factors = rgb_factors.tolist()
        # As newer hosts' formats say it: 3*p*p channels hold p x p pixels.
        self.spacial_downscale_ratio = max(1, math.isqrt(channels // 3))

    return type(name, (comfy.latent_formats.LatentFormat,), {"__init__": init})()


def unet_model(
    name: str,
    unet_config: dict[str, Any],
    weights: Mapping[str, Tensor],
    *,
    rgb_factors: Tensor,
    dtype: torch.dtype = torch.float32,
) -> comfy.model_patcher.ModelPatcher:
    """A v-predicting model on SD's schedule in the host's own UNet class.

    Args:
        name: of the latent format.
        unet_config: keyword arguments of the host's UNet class.
        weights: its state dict.
        rgb_factors: [channels, 3], latent channels to RGB in -1..1, for previews.
        dtype: of weights and arithmetic.

    Returns:
        MODEL, on the host's offload device.

    Raises:
        RuntimeError: weights and configuration do not belong together.
    """
    config = _OwnUNet(dict(unet_config))
    config.latent_format = _latent_format(name, unet_config["in_channels"], rgb_factors)
    config.set_inference_dtype(dtype, None)
    management = comfy.model_management
    model = comfy.model_base.BaseModel(
        config, model_type=comfy.model_base.ModelType.V_PREDICTION, device=management.unet_offload_device()
    )
    model.diffusion_model.load_state_dict({k: v.to(dtype) for k, v in weights.items()})
    return comfy.model_patcher.ModelPatcher(
        model.eval(), load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


class _Tokenizer:
    """The host's tokenizer interface over texts that are encoded as they are, but for embeddings from files."""

    width: int  # of an embedding's vectors

    def __init__(
        self, embedding_directory: list[str] | None = None, tokenizer_data: dict[str, Any] | None = None
    ) -> None:
        self.embedding_directory = embedding_directory

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, list]:
        text, found = take_embeddings(text, self._load)
        return {"text": [text], **({"pseudo": [found]} if found else {})}

    def _load(self, name: str) -> Tensor | None:
        folders = self.embedding_directory
        found = None if folders is None else comfy.sd1_clip.load_embed(name, folders, self.width, KEY)
        if found is None:
            logging.warning("warning, embedding:%s does not exist, ignoring", name)
        elif found.shape[-1] != self.width:
            logging.warning(
                "embedding:%s is of another model (width %d, here %d) and is ignored", name, found.shape[-1], self.width
            )
            found = None
        return found

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class SmallTextModel(nn.Module):
    """The host's text-model interface over a small encoder, see `text_clip`."""

    def __init__(
        self, encoder: nn.Module, device: torch.device, dtype: torch.dtype, model_options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.encoder = encoder.to(device, dtype)
        self.dtypes = {dtype}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """A single layer: there is nothing to choose."""

    def reset_clip_options(self) -> None:
        """See `set_clip_options`."""

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, None]:
        (pseudo,) = tokens.get("pseudo", [{}])
        out = self.encoder(tokens["text"], pseudo)
        return out.float().to(comfy.model_management.intermediate_device()), None

    def word_tokens(self, tokens: dict[str, list]) -> tuple[int, ...]:
        """Places of a text's words in what it is encoded to: its encoder puts one token before them.

        Raises:
            ValueError: it has none that the encoder knows.
        """
        ((text,), (pseudo,)) = tokens["text"], tokens.get("pseudo", [{}])
        return tuple(range(1, 1 + len(self.encoder.words(text, pseudo))))

    def load_sd(self, weights: dict[str, Tensor]) -> Any:
        return self.encoder.load_state_dict(weights)


def text_clip(encoder: nn.Module, width: int) -> comfy.sd.CLIP:
    """A small encoder as the host's CLIP. It runs in float32.

    Args:
        encoder: `encoder(texts, pseudo) -> [B, tokens, channels]`, `pseudo` the vectors [n, width] of pseudo-words
            "<like-this>" in the texts. To learn pseudo-words and to find a subject by a word `encoder.words(text,
            pseudo) -> [n, width]`, the vectors of known words, and to learn `encoder.prompt(template, class_word) ->
            str`, the template as this encoder needs it.
        width: of a word's vector.
    """

    class Tokenizer(_Tokenizer):
        pass

    class Target:
        params = {"encoder": encoder}
        clip = SmallTextModel
        tokenizer = Tokenizer

    Tokenizer.width = width
    folders = folder_paths.get_folder_paths("embeddings")
    return comfy.sd.CLIP(Target, embedding_directory=folders, model_options={"dtype": torch.float32})


class PixelVAE:
    """The host's VAE interface over an exact, weightless encoding of pixels."""

    def __init__(
        self, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], ratio: int, channels: int
    ) -> None:
        self._encode, self._decode = encode, decode
        self.downscale_ratio = self.upscale_ratio = ratio
        self.latent_channels, self.latent_dim = channels, 2
        self.output_device = comfy.model_management.intermediate_device()

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Images [B, H, W, 3] in 0..1 to latents."""
        return self._encode(pixel_samples.float()).to(self.output_device)

    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        """Latents to images [B, H, W, 3] in 0..1.

        Raises:
            ValueError: the latent has another number of channels.
        """
        if samples_in.shape[1] != self.latent_channels:
            raise ValueError(
                f"this VAE decodes latents of {self.latent_channels} channels, this one has {samples_in.shape[1]}: "
                "use the VAE of the model that made the latent"
            )
        return self._decode(samples_in.float()).to(self.output_device)

    def encode_tiled(self, pixel_samples: Tensor, **_: Any) -> Tensor:
        """Tiles would change nothing: every position is encoded by itself."""
        return self.encode(pixel_samples)

    def decode_tiled(self, samples: Tensor, **_: Any) -> Tensor:
        """See `encode_tiled`."""
        return self.decode(samples)

    def spacial_compression_encode(self) -> int:  # the host's spelling
        return self.downscale_ratio

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio

    def temporal_compression_decode(self) -> None:
        """Images, not video."""
