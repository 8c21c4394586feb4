"""The demo model inside ComfyUI: its UNet class against ours, its nodes, and the stock nodes on top of them."""

import numpy
import pytest
import torch
from semantic_style.nodes.nodes_paperland import DrawClip, DrawScene, EmptyLatent, EncodeCaption, LoadPaperland
from semantic_style.paperland import model as paperland
from semantic_style.paperland import scenes

CAPTION = "blue and blue shaded sky, orange and orange shaded hill"


@pytest.fixture(scope="module")
def loaded():
    with torch.inference_mode():
        return LoadPaperland.execute("fp32").result


@pytest.fixture(scope="module")
def ours():
    return paperland.load()


def stock(name):
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[name]()


def conditioning(loaded, text):
    return stock("CLIPTextEncode").encode(loaded[1], text)[0]


def run_ksampler(loaded, latent, positive, *, steps=8, cfg=3.0, denoise=1.0, seed=1):
    with torch.inference_mode():
        return stock("KSampler").sample(
            loaded[0], seed, steps, cfg, "euler", "normal", positive, conditioning(loaded, ""), latent, denoise
        )[0]


class Recorder:
    """Hooks of every kind; what they saw, in order, with shapes."""

    def __init__(self):
        self.seen = []

    def options(self):
        def block(h, *rest):
            self.seen.append((rest[-1]["block"], tuple(h.shape)))
            return (h, rest[0]) if len(rest) == 2 else h

        def attend(kind):
            def patch(q, k, v, extra):
                keys = ("block", "block_index", "n_heads", "dim_head", "activations_shape", "transformer_index")
                self.seen.append(
                    (kind, tuple(q.shape), tuple(k.shape), tuple(v.shape), *(str(extra.get(key)) for key in keys))
                )
                return q if kind == "attn1_replace" else (q, k, v)

            return patch

        def after(n, extra):
            self.seen.append(("after", tuple(n.shape), extra["block"]))
            return n

        return {
            "patches": {
                "input_block_patch": [block],
                "input_block_patch_after_skip": [block],
                "output_block_patch": [block],
                "attn1_patch": [attend("attn1_patch")],
                "attn2_patch": [attend("attn2_patch")],
                "attn1_output_patch": [after],
                "attn2_output_patch": [after],
                "middle_patch": [after],
            },
            "patches_replace": {"attn1": {("output", 3, 0): attend("attn1_replace")}},
        }


@pytest.mark.parametrize("size", [(32, 32), (19, 26)])
def test_the_same_network_in_both_classes(loaded, ours, size):
    theirs = loaded[0].model.diffusion_model
    assert type(theirs) is not type(ours.unet)
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 48, *size, generator=g), torch.tensor([900.0, 20.0])
    context = ours.text([CAPTION, ""])
    records = Recorder(), Recorder()
    with torch.no_grad():
        a = theirs.to("cpu")(x, t, context, transformer_options=records[0].options())
        b = ours.unet(x, t, context, records[1].options())
        plain = ours.unet(x, t, context)
    assert (a - b).abs().max() < 1e-5
    assert records[0].seen == records[1].seen
    assert len(records[0].seen) > 30
    assert not torch.allclose(b, plain), "the replaced attention changed nothing"


def test_attention_override_fires_in_both(loaded, ours):
    x, t, context = torch.randn(1, 48, 8, 8), torch.tensor([500.0]), ours.text([CAPTION])
    calls = []
    for unet in (loaded[0].model.diffusion_model.to("cpu"), ours.unet):
        seen = []

        def override(func, *args, seen=seen, **kwargs):
            seen.append([tuple(a.shape) for a in args[:3]] + [args[3]])
            return func(*args, **kwargs)

        with torch.no_grad():
            unet(x, t, context, transformer_options={"optimized_attention_override": override})
        calls.append(seen)
    assert calls[0] == calls[1]
    assert len(calls[0]) == 12


def test_denoised_agrees_through_the_host(loaded, ours):
    import comfy.samplers

    x, sigma = torch.randn(2, 48, 32, 32), torch.tensor([2.0, 2.0])
    cond = conditioning(loaded, CAPTION)
    assert torch.allclose(cond[0][0], ours.text([CAPTION]), atol=1e-6)
    caught = []

    def look(x, sigma):
        caught.append((x.clone(), sigma.clone()))

    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(loaded[0])
        guider.set_conds(cond, conditioning(loaded, ""))
        guider.set_cfg(3.0)
        got = guider.sample(
            torch.zeros_like(x), x, OneCall(sigma, look), torch.tensor([2.0, 0.0]), disable_pbar=True, seed=0
        )
        want = ours.guided(ours.text([CAPTION]), ours.text([""]), 3.0)(x, sigma)
    assert len(caught) == 1
    assert torch.allclose(got, want, atol=2e-5)


class OneCall:
    """A sampler that evaluates the guided model once, at the latent image itself."""

    def __init__(self, sigma, look):
        self.sigma, self.look = sigma, look

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        self.look(latent_image, self.sigma)
        return model_wrap(latent_image, self.sigma.to(latent_image.device), **extra_args)


def test_stock_nodes_make_a_picture_of_the_caption(loaded):
    latent = EmptyLatent.execute(128, 128, 2).result[0]
    made = run_ksampler(loaded, latent, conditioning(loaded, CAPTION), steps=16)
    with torch.inference_mode():
        images = stock("VAEDecode").decode(loaded[2], made)[0]
    assert images.shape == (2, 128, 128, 3)
    top, bottom = images[:, :24].mean(dim=(1, 2)), images[:, 100:].mean(dim=(1, 2))
    for color, name in ((top, "blue"), (bottom, "orange")):
        wanted = torch.tensor(scenes.COLORS[name]) / 255
        assert ((color - wanted).norm(dim=1) < 0.3).all(), (name, color)
    assert not torch.equal(images[0], images[1])


def test_vae_round_trip_through_stock_nodes(loaded):
    image = DrawScene.execute(1, 2, 128, 96).result[0]
    with torch.inference_mode():
        latent = stock("VAEEncode").encode(loaded[2], image)[0]
        back = stock("VAEDecode").decode(loaded[2], latent)[0]
    assert latent["samples"].shape == (1, 48, 24, 32)
    assert (back - image).abs().max() < 1e-6
    with pytest.raises(ValueError, match="48 channels, this one has 4"):
        loaded[2].decode(torch.zeros(1, 4, 8, 8))


def test_noise_mask_keeps_the_rest(loaded):
    image = DrawScene.execute(1, 2, 128, 128).result[0]
    mask = torch.zeros(1, 128, 128)
    mask[:, 64:] = 1
    with torch.inference_mode():
        latent = stock("VAEEncode").encode(loaded[2], image)[0]
        masked = stock("SetLatentNoiseMask").set_mask(latent, mask)[0]
        made = run_ksampler(loaded, masked, conditioning(loaded, CAPTION), steps=6)
        back = stock("VAEDecode").decode(loaded[2], made)[0]
    assert (back - image)[:, :60].abs().max() < 1e-4
    assert (back - image)[:, 68:].abs().mean() > 0.05


def test_previews_show_the_picture(loaded):
    import latent_preview

    image = DrawScene.execute(1, 2, 128, 128).result[0]
    model = loaded[0].model
    previewer = latent_preview.Latent2RGBPreviewer(model.latent_format.latent_rgb_factors, None)
    picture = previewer.decode_latent_to_preview(model.process_latent_in(loaded[2].encode(image)))
    small = torch.nn.functional.avg_pool2d(image.permute(0, 3, 1, 2), 4)[0].permute(1, 2, 0)
    shown = torch.from_numpy(numpy.array(picture)) / 255
    assert (shown - small).abs().max() < 0.02


def test_same_seed_same_picture(loaded):
    latent = EmptyLatent.execute(64, 64, 1).result[0]
    a, b = (run_ksampler(loaded, latent, conditioning(loaded, CAPTION), steps=3)["samples"] for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_runs(precision):
    with torch.inference_mode():
        loaded = LoadPaperland.execute(precision).result
    latent = EmptyLatent.execute(64, 64, 1).result[0]
    made = run_ksampler(loaded, latent, conditioning(loaded, CAPTION), steps=2)["samples"]
    assert torch.isfinite(made).all()


def test_caption_node_names_unknown_words(loaded):
    result = EncodeCaption.execute(loaded[1], "a sparkling red sky").result
    assert result[1] == "sparkling"
    assert torch.equal(result[0][0][0], conditioning(loaded, "red sky")[0][0])


def test_bad_precision_is_refused():
    with pytest.raises(ValueError, match="fp8"):
        LoadPaperland.execute("fp8")


def test_scene_node_outputs():
    image, labels, caption, label_image, subject = DrawScene.execute(3, 4, 160, 128).result
    assert subject.shape == (1, 128, 160)
    assert torch.equal(subject, scenes.object_mask(labels))
    assert image.shape == label_image.shape == (1, 128, 160, 3)
    assert labels.shape == (1, 128, 160)
    assert not labels.is_floating_point()
    assert "sky" in caption


def test_scene_node_draws_a_single_object():
    image, labels, caption, _, subject = DrawScene.execute(3, 4, 128, 128, "one tree").result
    alone = scenes.single("tree", 3, 4)
    assert torch.equal(image, alone.images)
    assert caption == alone.captions[0]
    assert torch.equal(subject.bool(), labels == scenes.TREE)
    assert [o.display_name for o in DrawScene.define_schema().outputs][-1] == "subject"


def test_clip_node_outputs():
    images, labels, caption, label_images = DrawClip.execute(3, 4, 5, 1.0, 160, 128).result
    still = DrawScene.execute(3, 4, 160, 128).result
    assert images.shape == label_images.shape == (5, 128, 160, 3)
    assert labels.shape == (5, 128, 160)
    assert torch.equal(images[:1], still[0])
    assert torch.equal(label_images[:1], still[3])
    assert not torch.equal(images[4], images[0])
    assert "sky" in caption


def test_a_clip_is_a_batch_for_the_model(loaded):
    images = DrawClip.execute(3, 4, 3, 1.0, 64, 64).result[0]
    with torch.inference_mode():
        latent = stock("VAEEncode").encode(loaded[2], images)[0]
        back = stock("VAEDecode").decode(loaded[2], latent)[0]
    assert latent["samples"].shape == (3, 48, 16, 16)
    assert (back - images).abs().max() < 1e-6
