"""Pseudo-words in the host's prompts: stock CLIPs, embedding files, the demo's captions."""

import logging

import comfy.samplers
import folder_paths
import pytest
import torch
from newer_hosts import dynamic
from semantic_style.benchmarks.random_models import small_sd15, small_sdxl
from semantic_style.benchmarks.text_models import RIGHT, small_clip
from semantic_style.files.embedding_file import SUFFIX, save_embedding
from semantic_style.host.gradients import differentiable
from semantic_style.host.learn_word import _Predict
from semantic_style.host.pseudo_words import KEY, make_prompt
from semantic_style.nodes.nodes_paperland import EncodeCaption, LoadPaperland
from semantic_style.paperland.text import REGIONS, WORDS

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

KINDS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def clips():
    with torch.inference_mode():
        return {kind: small_clip(kind, folders=folder_paths.get_folder_paths("embeddings")) for kind in KINDS}


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return LoadPaperland.execute("fp32").result


@pytest.fixture
def embeddings(tmp_path, monkeypatch):
    """A folder of embeddings that CLIPs loaded from now on, and `clips`, look into."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def looking_into(clip, folder):
    clip = clip.clone()
    parts = [clip.tokenizer, *vars(clip.tokenizer).values()]
    for part in parts:
        if hasattr(part, "embedding_directory"):
            part.embedding_directory = [str(folder)]
    return clip


def random_like(vectors, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in vectors.items()}


def encode(clip, text):
    import nodes

    return nodes.NODE_CLASS_MAPPINGS["CLIPTextEncode"]().encode(clip, text)[0]


def assert_same(a, b):
    assert len(a) == len(b) == 1
    assert torch.equal(a[0][0], b[0][0])
    pooled = [c[0][1]["pooled_output"] for c in (a, b)]
    assert (pooled[0] is None and pooled[1] is None) or torch.equal(*pooled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "template",
    ["<it>", "a (pencil:1.2) drawing of a (<it>:1.3), by <it>", "<it>, " + "very long " * 60 + "and <it>"],
    ids=["alone", "weights", "several chunks"],
)
def test_the_prompt_is_what_a_user_of_the_file_gets(clips, embeddings, kind, template):
    clip = looking_into(clips[kind], embeddings)
    prompt = make_prompt(clip, template, "house", 3)
    vectors = random_like(prompt.start)
    save_embedding(embeddings / f"spin{SUFFIX}", vectors)
    expected = encode(clip, template.replace("<it>", "embedding:spin"))
    assert_same(clip.encode_from_tokens_scheduled(prompt.with_vectors(vectors)), expected)
    assert_same(prompt.conditioning(vectors), expected)
    assert not torch.equal(expected[0][0], encode(clip, template.replace("<it>", "house"))[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_the_class_word_cycled(clips, kind):
    clip = clips[kind]
    two = make_prompt(clip, "<it>", "red house", 5).start
    for name, vectors in two.items():
        part = getattr(clip.tokenizer, name)
        ids = [part.tokenizer(word)["input_ids"][1] for word in ("red", "house")]
        table = getattr(clip.cond_stage_model, name).transformer.get_input_embeddings().weight
        assert torch.equal(vectors, table[[ids[0], ids[1], ids[0], ids[1], ids[0]]])
    assert set(two) == {"sd1": {"clip_l"}, "sd2": {"clip_h"}, "sdxl": {"clip_l", "clip_g"}}[kind]


def test_with_the_class_word_s_vectors_it_is_the_class_word(clips):
    prompt = make_prompt(clips["sd1"], "a photo of <it>", "house", 1)
    assert_same(prompt.conditioning(prompt.start), encode(clips["sd1"], "a photo of house"))


def test_the_clip_s_options_count(clips, embeddings):
    clip = looking_into(clips["sd1"], embeddings)
    clip.clip_layer(-2)
    prompt = make_prompt(clip, "<it>", "house", 1)
    assert_same(prompt.conditioning(prompt.start), encode(clip, "house"))
    assert not torch.equal(prompt.conditioning(prompt.start)[0][0], encode(clips["sd1"], "house")[0][0])


class Probe(comfy.samplers.Sampler):
    """Compares a gradient with respect to the vectors with differences, inside a run."""

    def __init__(self, prompt):
        self.prompt = prompt

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, *_, **__):
        with differentiable(guider.model_patcher, extra_args["model_options"]) as options:
            predict = _Predict(guider, options)
            x = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
            sigma, weight = torch.full((len(x),), 1.5), torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

            def value(vectors):
                return (predict(x, sigma, self.prompt.conditioning(vectors)) * weight).double().sum()

            start = {k: v.clone().requires_grad_() for k, v in self.prompt.start.items()}
            gradients = torch.autograd.grad(value(start), list(start.values()))
            self.pairs = []
            for name, gradient in zip(start, gradients, strict=True):
                along = gradient / gradient.norm()
                with torch.no_grad():
                    ends = [
                        value({k: v.detach() + (sign * 0.005 * along if k == name else 0) for k, v in start.items()})
                        for sign in (1, -1)
                    ]
                self.pairs.append((float(gradient.norm()), float(ends[0] - ends[1]) / 0.01))
        return noise


def probed(kind, clip):
    """Gradients and differences, with a weight in the prompt, and for SDXL also by way of the pooled vector."""
    model = small_sdxl(pooled=RIGHT) if kind == "sdxl" else small_sd15(linear=kind == "sd2")
    prompt = make_prompt(clip, "a drawing of (<it>:1.2)", "house", 2)
    guider = comfy.samplers.CFGGuider(model)
    start = prompt.conditioning(prompt.start)
    guider.set_conds(start, start)
    probe = Probe(prompt)
    blank = torch.zeros(1, 4, 8, 8)
    guider.sample(blank, blank, probe, torch.tensor([1.5, 0.0]), disable_pbar=True)
    assert len(probe.pairs) == (2 if kind == "sdxl" else 1)
    return probe.pairs


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_the_vectors_of_every_encoder(clips, kind):
    for gradient, difference in probed(kind, clips[kind]):
        assert gradient > 1e-3
        assert difference == pytest.approx(gradient, rel=0.01)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_gradient_of_an_encoder_whose_weights_memory_is_used_again(clips, kind, inference):
    clip = small_clip(kind)
    clip.patcher = dynamic(clip.patcher, inference)
    for (gradient, _), (expected, _) in zip(probed(kind, clip), probed(kind, clips[kind]), strict=True):
        assert gradient == pytest.approx(expected, rel=1e-5)


def test_the_encoder_is_told_its_device(clips):
    """Newer hosts run it where the embedding's weight lies otherwise, which may be the CPU."""
    clip, told = clips["sd1"].clone(), []
    prompt = make_prompt(clip, "<it>", "house", 1)
    encoder = clip.cond_stage_model.clip_l
    handle = encoder.register_forward_pre_hook(lambda module, _: told.append(getattr(module, "execution_device", None)))
    prompt.conditioning(prompt.start)
    handle.remove()
    assert told == [clip.patcher.load_device if hasattr(encoder, "execution_device") else None]


@pytest.mark.parametrize(
    ("template", "class_word", "count", "message"),
    [
        ("a house", "house", 1, "must contain <it>"),
        ("<it>", "", 1, "class_word must be"),
        ("<it>", "house", 0, "at least 1"),
    ],
)
def test_refusals(clips, template, class_word, count, message):
    for kind in KINDS:
        with pytest.raises(ValueError, match=message):
            make_prompt(clips[kind], template, class_word, count)


def test_another_kind_of_text_encoder_is_refused(clips, monkeypatch):
    clip = clips["sd1"].clone()
    monkeypatch.setattr(clip, "tokenize", lambda text: {"t5xxl": [[(5, 1.0)]]})
    with pytest.raises(ValueError, match="t5xxl"):
        make_prompt(clip, "<it>", "house", 1)


def test_captions_know_embeddings(demo, embeddings, caplog):
    clip = looking_into(demo[1], embeddings)
    table = clip.cond_stage_model.encoder.word.weight
    row = lambda word: table[[WORDS.index(word)]]  # noqa: E731
    save_embedding(embeddings / f"red{SUFFIX}", {KEY: row("red")})
    save_embedding(embeddings / f"striped.v2{SUFFIX}", {KEY: torch.cat([row("blue"), row("striped")])})
    assert_same(encode(clip, "embedding:red house, green sky"), encode(clip, "red house, green sky"))
    assert_same(encode(clip, "(embedding:red house:1.2), green sky"), encode(clip, "red house, green sky"))
    two = encode(clip, "red embedding:striped.v2 house")
    assert not torch.equal(two[0][0], encode(clip, "red house")[0][0])
    assert not caplog.records
    assert_same(encode(clip, "embedding:gone red house"), encode(clip, "red house"))
    assert "embedding:gone does not exist, ignoring" in caplog.text
    conditioning, unknown = EncodeCaption.execute(clip, "embedding:red house, fluffy green sky").result
    assert_same(conditioning, encode(clip, "red house, green sky"))
    assert unknown == "fluffy"


def test_an_embedding_of_another_model_is_ignored_with_a_warning(demo, embeddings, caplog):
    clip = looking_into(demo[1], embeddings)
    save_embedding(embeddings / f"other{SUFFIX}", {"clip_l": torch.ones(1, 768)})
    with caplog.at_level(logging.WARNING):
        assert_same(encode(clip, "embedding:other red house"), encode(clip, "red house"))
    assert "width 768, here 128" in caplog.text


def test_the_demo_s_clip_looks_into_the_embeddings_folder(embeddings):
    clip = LoadPaperland.execute("fp32").result[1]
    save_embedding(embeddings / f"red{SUFFIX}", {KEY: clip.cond_stage_model.encoder.words("red")})
    assert_same(encode(clip, "embedding:red house"), encode(clip, "red house"))


def test_a_paperland_template_without_a_region_gets_the_class_word_s(demo, embeddings):
    clip = looking_into(demo[1], embeddings)
    prompt = make_prompt(clip, "<it>", "striped house", 2)
    assert prompt.text == "<it> house"
    assert torch.equal(prompt.start[KEY], clip.cond_stage_model.encoder.words("striped house"))
    vectors = random_like(prompt.start)
    save_embedding(embeddings / f"spin{SUFFIX}", vectors)
    assert_same(prompt.conditioning(vectors), encode(clip, "embedding:spin house"))
    assert "house" in REGIONS
