"""The compact UNet and its frame outside the host: pixels, schedule, hooks, checkpoints."""

import pytest
import torch
from semantic_style.paperland import model as paperland
from semantic_style.paperland.unet import PaperlandUNet, UNetConfig

SMALL = UNetConfig(channels=32, multipliers=(1, 1, 2), context_channels=16, head_channels=16)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return paperland.Paperland(SMALL).eval().requires_grad_(False)


def test_pixels_survive_exactly():
    images = (torch.rand(2, 24, 32, 3) * 255).round() / 255
    latents = paperland.encode_pixels(images)
    assert latents.shape == (2, 48, 6, 8)
    assert (paperland.decode_pixels(latents) - images).abs().max() < 1e-6


def test_odd_sizes_are_cut_to_whole_patches():
    images = torch.rand(1, 27, 34, 3)
    assert torch.allclose(paperland.decode_pixels(paperland.encode_pixels(images)), images[:, 1:25, 1:33], atol=1e-6)
    with pytest.raises(ValueError, match="3x9 pixels"):
        paperland.encode_pixels(torch.rand(1, 9, 3, 3))


def test_preview_factors_average_a_patch():
    images = torch.rand(1, 8, 8, 3)
    preview = torch.einsum("bchw,cr->bhwr", paperland.encode_pixels(images), paperland.preview_factors())
    pooled = torch.nn.functional.avg_pool2d((images * 2 - 1).permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    assert torch.allclose(preview, pooled, atol=1e-6)


def test_schedule_is_that_of_stable_diffusion():
    sigmas = paperland.schedule()
    assert sigmas[0].item() == pytest.approx(0.02917, abs=1e-5)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)
    levels = paperland.sigmas_normal(20)
    assert levels[0].item() == pytest.approx(sigmas[-1].item(), rel=1e-6)
    assert levels[-2].item() == pytest.approx(sigmas[0].item(), rel=1e-6)
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()


def test_timestep_inverts_the_schedule(small):
    t = torch.tensor([0, 1, 500, 999])
    assert torch.equal(small.timestep(small.sigmas[t]), t.float())


def test_denoised_is_exact_for_a_perfect_v(small, monkeypatch):
    """With the true v in place of the network, denoised is the clean latent at every level."""
    clean, noise = torch.randn(2, 3, 48, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.05, 1.0, 14.0], dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    v = (noise - s * clean) / (1 + s * s).sqrt()
    monkeypatch.setattr(small.unet, "forward", lambda *_: v)
    assert torch.allclose(small(clean + s * noise, sigma, small.text([""])), clean, atol=1e-12)


def test_guidance(small):
    x, sigma = torch.randn(2, 48, 8, 8), torch.tensor([2.0, 2.0])
    c, u = small.text(["red sky"]), small.text([""])
    with_c, with_u = small(x, sigma, c), small(x, sigma, u)
    assert torch.allclose(small.guided(c, u, 1.0)(x, sigma), with_c, atol=1e-6)
    assert torch.allclose(small.guided(c, u, 3.5)(x, sigma), with_u + 3.5 * (with_c - with_u), atol=1e-5)


def test_odd_grids(small):
    x = torch.randn(1, 48, 9, 13)
    assert small(x, torch.ones(1), small.text([""])).shape == x.shape


def test_every_hook_fires(small):
    seen: list[tuple] = []

    def block_patch(h, *rest):
        seen.append(("block", rest[-1]["block"]))
        return (h, rest[0]) if len(rest) == 2 else h

    def attention_patch(q, k, v, extra):
        seen.append(("patch", extra["block"], extra["block_index"], extra["n_heads"]))
        return q, k, v

    def replace(q, k, v, extra):
        seen.append(("replace", extra["block"]))
        return q

    options = {
        "patches": {
            "input_block_patch": [block_patch],
            "output_block_patch": [block_patch],
            "attn1_patch": [attention_patch],
            "attn2_output_patch": [lambda n, extra: n * 0],
            "middle_patch": [lambda n, extra: n + 1],
        },
        "patches_replace": {"attn1": {("output", 4, 0): replace}, "attn2": {("middle", 0): replace}},
        "optimized_attention_override": lambda func, *a, **k: seen.append(("override",)) or func(*a, **k),
    }
    x = torch.randn(1, 48, 8, 8)
    plain = small(x, torch.ones(1), small.text([""]))
    patched = small(x, torch.ones(1), small.text([""]), options)
    assert not torch.allclose(plain, patched)
    transformers = [("middle", 0), ("output", 0), ("output", 1), ("output", 2), ("output", 3), ("output", 4)]
    assert [s[1] for s in seen if s[0] == "patch"] == transformers
    assert [s[1] for s in seen if s[0] == "replace"] == [("middle", 0), ("output", 4)]
    assert [s[1] for s in seen if s[0] == "block"] == [("input", i) for i in range(6)] + [
        ("output", i) for i in range(6)
    ]
    assert len([s for s in seen if s[0] == "override"]) == 2 * len(transformers) - 2
    assert torch.equal(small(x, torch.ones(1), small.text([""])), plain)


def test_output_block_patch_sees_the_decoder_features(small):
    shapes = {}

    def look(h, skip, options):
        shapes[options["block"][1]] = tuple(h.shape[1:])
        return h, skip

    small(torch.randn(1, 48, 16, 16), torch.ones(1), small.text([""]), {"patches": {"output_block_patch": [look]}})
    assert shapes == {0: (64, 4, 4), 1: (64, 4, 4), 2: (64, 8, 8), 3: (32, 8, 8), 4: (32, 16, 16), 5: (32, 16, 16)}


def test_checkpoint_round_trip(small, tmp_path):
    path = tmp_path / "w.safetensors"
    paperland.save(small, path, {"steps": "3"})
    loaded = paperland.load(path)
    assert loaded.unet.config == SMALL
    for name, weight in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float()), name


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no Paperland checkpoint"):
        paperland.read(path)


def test_shipped_checkpoint_loads_and_is_small():
    assert paperland.WEIGHTS.stat().st_size <= 25_000_000
    config, weights = paperland.read()
    model = PaperlandUNet(config)
    model.load_state_dict({k.removeprefix("unet."): w for k, w in weights.items() if k.startswith("unet.")})
    assert min(config.channels * m for m in config.multipliers) > paperland.LATENT_CHANNELS
