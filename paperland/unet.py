"""The compact Paperland UNet: shaped like SD1.x, speaking the hook protocol of ComfyUI, weight-compatible with
ComfyUI's UNet class.

Parameter names, the order of the operations and the hooks (`transformer_options`: `patches`, `patches_replace`,
`optimized_attention_override`, `block`, `block_index`) are those that ComfyUI gives its SD UNets, so one checkpoint
runs in either, and
code that reads features or patches attention is written once. `config.host()` is the `unet_config` for ComfyUI's class.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Options = dict[str, Any]

GROUPS = 32  # of every GroupNorm, as in SD1.x


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the UNet. Levels run from the finest to the coarsest; every level but the last halves the grid.

    depth_in: transformer blocks after each residual block of a level of the encoder.
    depth_out: the same for the decoder, for each of a level's `res_blocks + 1` residual blocks by itself.
    """

    channels_in: int = 48
    channels: int = 96
    multipliers: tuple[int, ...] = (1, 1, 2)
    res_blocks: int = 1
    depth_in: tuple[int, ...] = (0, 0, 0)
    depth_middle: int = 1
    depth_out: tuple[tuple[int, ...], ...] = ((1, 0), (1, 1), (1, 1))
    head_channels: int = 32
    context_channels: int = 128

    def host(self) -> Options:
        """Keyword arguments (`unet_config`) that make ComfyUI's own UNet class the same network."""
        return {
            "image_size": 32,
            "in_channels": self.channels_in,
            "out_channels": self.channels_in,
            "model_channels": self.channels,
            "channel_mult": list(self.multipliers),
            "num_res_blocks": [self.res_blocks] * len(self.multipliers),
            "transformer_depth": [d for d in self.depth_in for _ in range(self.res_blocks)],
            "transformer_depth_middle": self.depth_middle,
            "transformer_depth_output": [d for level in self.depth_out for d in reversed(level)],
            "num_heads": -1,
            "num_head_channels": self.head_channels,
            "context_dim": self.context_channels,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "use_scale_shift_norm": True,
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "legacy": False,
        }


def timestep_embedding(timesteps: Tensor, channels: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of the timesteps at geometrically spaced frequencies: [B] -> [B, channels], float32."""
    half = channels // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_: Any) -> Tensor:
    """Multi-head attention. q [B, N, heads*d], k and v [B, M, heads*d] -> [B, N, heads*d]; the host's attention
    signature."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class ResBlock(nn.Module):
    """Residual block whose second half is scaled and shifted by the noise level (the host's `use_scale_shift_norm`)."""

    def __init__(self, channels: int, embedding: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb_layers(emb).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = norm(self.in_layers(x)) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Identity())

    def forward(self, x: Tensor, context: Tensor, value: Tensor, options: Options) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(value)
        override = options.get("optimized_attention_override")
        if override is None:
            out = attention(q, k, v, self.heads)
        else:
            out = override(attention, q, k, v, self.heads, attn_precision=None, transformer_options=options)
        return self.to_out(out)


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int, multiplier: int = 4) -> None:
        super().__init__()
        inner = channels * multiplier
        self.net = nn.Sequential(GEGLU(channels, inner), nn.Identity(), nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each before a residual sum and open to the host's patches."""

    def __init__(self, channels: int, context: int, head_channels: int) -> None:
        super().__init__()
        self.heads, self.head_channels = channels // head_channels, head_channels
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, channels, self.heads)
        self.attn2 = Attention(channels, context, self.heads)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor, options: Options) -> Tensor:
        patches = options.get("patches", {})
        extra = {k: v for k, v in options.items() if k not in ("patches", "patches_replace")}
        extra |= {"n_heads": self.heads, "dim_head": self.head_channels, "attn_precision": None}

        n = self.norm1(x)
        x = self._attend("attn1", self.attn1, n, n, options, extra) + x
        for patch in patches.get("middle_patch", ()):
            x = patch(x, extra)
        x = self._attend("attn2", self.attn2, self.norm2(x), context, options, extra) + x
        return x + self.ff(self.norm3(x))

    def _attend(
        self, name: str, layer: Attention, n: Tensor, context: Tensor, options: Options, extra: Options
    ) -> Tensor:
        patches = options.get("patches", {})
        value = context
        for patch in patches.get(f"{name}_patch", ()):
            n, context, value = patch(n, context, value, extra)
        replacement = self._replacement(name, options)
        if replacement is None:
            n = layer(n, context, value, options)
        else:
            n = layer.to_out(replacement(layer.to_q(n), layer.to_k(context), layer.to_v(value), extra))
        for patch in patches.get(f"{name}_output_patch", ()):
            n = patch(n, extra)
        return n

    @staticmethod
    def _replacement(name: str, options: Options) -> Any:
        """The function that takes this attention's place: set for this very block, or for all transformer blocks of
        its place."""
        replacements = options.get("patches_replace", {}).get(name, {})
        block = options.get("block")
        if block is None or not replacements:
            return None
        return replacements.get((*block, options.get("block_index", 0)), replacements.get(block))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context: int, head_channels: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context, head_channels) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, options: Options) -> Tensor:
        options["activations_shape"] = list(x.shape)
        h, w = x.shape[-2:]
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for index, block in enumerate(self.transformer_blocks):
            options["block_index"] = index
            tokens = block(tokens, context, options)
        return x + self.proj_out(tokens).unflatten(1, (h, w)).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Stage(nn.Sequential):
    """The layers of one numbered block of the UNet."""

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor, options: Options, size: torch.Size | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, options)
                options["transformer_index"] += 1
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class PaperlandUNet(nn.Module):
    """Predicts v from scaled latents. Any grid size; sizes that do not halve evenly are restored on the way up."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        embedding = c.channels * 4
        self.time_embed = nn.Sequential(nn.Linear(c.channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def transformer(channels: int, depth: int) -> list[nn.Module]:
            return [SpatialTransformer(channels, c.context_channels, c.head_channels, depth)] if depth else []

        ch, skips = c.channels, [c.channels]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(c.channels_in, ch, 3, padding=1))])
        last = len(c.multipliers) - 1
        for level, multiplier in enumerate(c.multipliers):
            for _ in range(c.res_blocks):
                out = c.channels * multiplier
                self.input_blocks.append(Stage(ResBlock(ch, embedding, out), *transformer(out, c.depth_in[level])))
                ch = out
                skips.append(ch)
            if level != last:
                self.input_blocks.append(Stage(Downsample(ch)))
                skips.append(ch)
        self.middle_block = Stage(
            ResBlock(ch, embedding, ch), *transformer(ch, c.depth_middle), ResBlock(ch, embedding, ch)
        )
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            out = c.channels * c.multipliers[level]
            for i in range(c.res_blocks + 1):
                layers = [ResBlock(ch + skips.pop(), embedding, out), *transformer(out, c.depth_out[level][i])]
                if level and i == c.res_blocks:
                    layers.append(Upsample(out))
                self.output_blocks.append(Stage(*layers))
                ch = out
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, ch), nn.SiLU(), nn.Conv2d(ch, c.channels_in, 3, padding=1))

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Options | None = None, **_: Any
    ) -> Tensor:
        """Raw model output (v) at the input's scale.

        Args:
            x: scaled latents [B, C, H, W], that is x / sqrt(sigma^2 + 1).
            timesteps: [B], 0..999 of SD's schedule, fractional allowed.
            context: caption tokens [B, T, context_channels].
            transformer_options: hooks of the host's protocol. Like the host's UNet, the forward writes its place
            (`block`,
                `block_index`, ...) into the dict that it is given: hand it a copy if that matters.

        Returns:
            v [B, C, H, W].
        """
        options: Options = {} if transformer_options is None else transformer_options
        patches = options.get("patches", {})
        options["original_shape"] = list(x.shape)
        options["transformer_index"] = 0
        emb = self.time_embed(timestep_embedding(timesteps, self.config.channels).to(x.dtype))
        for patch in patches.get("emb_patch", ()):
            emb = patch(emb, self.config.channels, options)

        h, skips = x, []
        for index, stage in enumerate(self.input_blocks):
            options["block"] = ("input", index)
            h = stage(h, emb, context, options)
            for patch in patches.get("input_block_patch", ()):
                h = patch(h, options)
            skips.append(h)
            for patch in patches.get("input_block_patch_after_skip", ()):
                h = patch(h, options)

        options["block"] = ("middle", 0)
        h = self.middle_block(h, emb, context, options)

        for index, stage in enumerate(self.output_blocks):
            options["block"] = ("output", index)
            skip = skips.pop()
            for patch in patches.get("output_block_patch", ()):
                h, skip = patch(h, skip, options)
            size = skips[-1].shape[-2:] if skips else None
            h = stage(torch.cat([h, skip], dim=1), emb, context, options, size)
        return self.out(h)
