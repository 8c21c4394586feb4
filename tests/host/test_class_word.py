"""Find Subject by a word: which tokens and layers are read, what is found on the demo model, what is refused."""

from types import SimpleNamespace

import folder_paths
import pytest
import torch
from einops import rearrange
from semantic_style.attention.layers import transformer_block, word_layers
from semantic_style.benchmarks.random_models import small_sd15, small_sdxl
from semantic_style.benchmarks.saliency_quality import FOUND, overlap
from semantic_style.benchmarks.text_models import RIGHT, small_clip
from semantic_style.files.embedding_file import SUFFIX, save_embedding
from semantic_style.host.class_word import word_prompt
from semantic_style.host.find_subject import WORD_SIGMAS, SubjectRequest, find_subjects
from semantic_style.host.invert import InversionTask, invert_ddim
from semantic_style.host.small_model import KEY
from semantic_style.nodes.nodes_paperland import LoadPaperland
from semantic_style.nodes.nodes_saliency import FindSubject
from semantic_style.paperland import model as paperland
from semantic_style.paperland import scenes
from semantic_style.regions.word_subject import find_by_word

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

TWINS = {
    "sd1": (small_sd15, {}, [range(3, 6), range(6, 9), range(9, 12)], [1, 1, 1]),
    "sd2": (small_sd15, {"linear": True}, [range(3, 6), range(6, 9), range(9, 12)], [1, 1, 1]),
    "sdxl": (small_sdxl, {"pooled": RIGHT}, [range(3), range(3, 6)], [3, 2]),
}


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return LoadPaperland.execute("fp32").result


@pytest.fixture(scope="module")
def landscape():
    """Sun, tree, water and hill."""
    return scenes.scene(1001, 6001)


def run(model, clip, word, **inputs):
    given = {"sigma": 0.3, "threshold": 0.5, "mode": "hard", "grow": 0, "looks": 1, "seed": 0, **inputs}
    return FindSubject.execute(model, clip=clip, class_word=word, **given).result


def latent(rows=1, size=(16, 12)):
    samples = 0.1 * torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(1))
    samples[:, :, 5:10, 4:8] += 8
    return samples


@pytest.mark.parametrize("kind", TWINS)
def test_the_words_tokens_are_read_in_every_level_of_the_decoder(kind, monkeypatch):
    """Attention worked out by itself, from what the layers' projections give."""
    make, settings, blocks, depths = TWINS[kind]
    model, clip = make(**settings), small_clip(kind)
    unet = model.model.diffusion_model
    layers = word_layers(unet)
    assert layers == tuple(
        tuple(("output", b, j) for b in level for j in range(d)) for level, d in zip(blocks, depths, strict=True)
    )
    seen, calls = {}, []

    def keep(layer, part):
        # Not where the features are read: there the prompt is the empty one.
        return lambda module, args, out: seen.setdefault((layer, part), []).append(out.float())

    hooks = [
        getattr(transformer_block(unet, layer).attn2, part).register_forward_hook(keep(layer, part))
        for level in layers
        for layer in level
        for part in ("to_q", "to_k")
    ]

    def found(features, levels, share):
        calls.append(levels)
        return find_by_word(features, levels, share)

    monkeypatch.setattr("semantic_style.host.find_subject.find_by_word", found)
    try:
        (subject,) = find_subjects(SubjectRequest(model, latent(), looks=2, clip=clip, class_word=" red vase "))
    finally:
        for hook in hooks:
            hook.remove()
    assert subject.hard.any()
    assert not subject.hard.all()
    (levels,) = calls
    for level, maps in zip(layers, levels, strict=True):
        for layer, m in zip(level, maps, strict=True):
            heads = transformer_block(unet, layer).attn2.heads
            q, k = (
                rearrange(torch.cat(seen[layer, part][2:]), "r n (h d) -> r h n d", h=heads)
                for part in ("to_q", "to_k")
            )
            assert len(q) == 2 * len(WORD_SIGMAS)
            words = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)[..., 1:3].sum(dim=-1)
            torch.testing.assert_close(m.flatten(), words.mean(dim=(0, 1)), rtol=1e-4, atol=1e-6)
            assert m.shape[0] / m.shape[1] == 16 / 12


@pytest.mark.parametrize("kind", TWINS)
def test_tokens_of_the_hosts_encoders(kind):
    clip = small_clip(kind)
    for text, tokens in {
        "house": (1,),
        "a red vase": (1, 2, 3),
        "(house:1.3)": (1,),
        "house," * 2: (1, 2, 3, 4),
    }.items():
        conditioning, found = word_prompt(clip, text)
        assert found == tokens
        assert conditioning[0][0].shape[1] == 77
    with pytest.raises(ValueError, match=r"class_word '\(\)' has no token"):
        word_prompt(clip, "()")
    with pytest.raises(ValueError, match="longer than a prompt"):
        word_prompt(clip, "house " * 76)


def test_tokens_of_the_demo_models_encoder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    clip = LoadPaperland.execute("fp32").result[1]
    assert word_prompt(clip, "a red house, roof")[1] == (1, 2, 3)
    save_embedding(tmp_path / f"three{SUFFIX}", {KEY: torch.randn(3, 128)})
    conditioning, tokens = word_prompt(clip, "embedding:three house")
    assert tokens == (1, 2, 3, 4)
    house = clip.cond_stage_model.encoder(["house"])
    assert not torch.equal(conditioning[0][0][:, 1], house[:, 1])
    with pytest.raises(ValueError, match="knows none of the words in 'vase'"):
        word_prompt(clip, "vase")


def test_the_named_one_of_two_things_is_found(demo, landscape):
    model, clip, _ = demo
    given = {"latent": {"samples": paperland.encode_pixels(landscape.images)}, "image": landscape.images}
    found = {word: run(model, clip, word, looks=2, **given) for word in ("sun", "tree")}
    for word, region in (("sun", scenes.SUN), ("tree", scenes.TREE)):
        mask, _, report = found[word]
        assert overlap(mask[0].bool(), landscape.labels[0] == region) > FOUND
        assert "found by the class word" in report
    again = run(model, clip, "tree", looks=2, **given)[0]
    assert torch.equal(again, found["tree"][0])
    soft = run(model, clip, "tree", looks=2, mode="soft", **given)[0]
    assert ((soft > 0) & (soft < 1)).any()
    assert not torch.equal(run(model, clip, "tree", looks=2, seed=5, mode="soft", **given)[0], soft)


def test_every_picture_of_a_batch_by_itself(demo, landscape):
    model, clip, _ = demo
    both = torch.cat([landscape.images, scenes.single("tree", 1, 5001).images])
    masks = run(model, clip, "tree", latent={"samples": paperland.encode_pixels(both)}, image=both)[0]
    for i in range(2):
        alone = run(model, clip, "tree", latent={"samples": paperland.encode_pixels(both[i : i + 1])})[0]
        assert (alone[0] == masks[i]).float().mean() > 0.99


def test_an_inversion_is_looked_at_with_its_own_prompt():
    model, clip = small_sd15(), small_clip()
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a picture"))
    inversion = invert_ddim(InversionTask(model, prompt, prompt, latent(), 2, "normal", 1.0, 0))
    given = {"mode": "soft", "looks": 1}
    mask = run(model, clip, "vase", inversion=inversion, **given)[0]
    expected = run(model, clip, "vase", latent={"samples": latent()}, prompt=prompt, **given)[0]
    torch.testing.assert_close(mask, expected, atol=1e-4, rtol=0)
    other = run(model, clip, "vase", latent={"samples": latent()}, **given)[0]
    assert not torch.allclose(mask, other, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": None}, "to find 'vase' in the picture its text encoder is needed"),
        ({"word": "()"}, "has no token"),
        ({"word": "vase " * 80}, "longer than a prompt"),
        ({"threshold": 0.0}, "share of the attention's peak"),
        ({"clip": "t5"}, "a text encoder 't5xxl', whose words are not known"),
    ],
)
def test_refused_before_any_call(change, message):
    model, clip = small_sd15(), small_clip()
    if change.get("clip") == "t5":
        tokens = {"t5xxl": [[(5, 1.0, 1)]]}
        change = {"clip": SimpleNamespace(cond_stage_model=None, tokenize=lambda *_, **__: tokens)}
    calls = []
    model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    given = {"clip": clip, "word": "vase", "latent": {"samples": latent()}, "prompt": empty, **change}
    with pytest.raises(ValueError, match=message):
        run(model, **given)
    assert not calls


def test_without_a_word_the_clip_is_not_asked():
    model, clip = small_sd15(), small_clip()
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    given = {"latent": {"samples": latent()}, "prompt": empty}
    assert torch.equal(run(model, None, "  ", **given)[0], run(model, SimpleNamespace(), "", **given)[0])
