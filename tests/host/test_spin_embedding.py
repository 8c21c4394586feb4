"""Learning an embedding through the host: the run, the node, its file, what is refused, what stays as it was."""

import logging
from dataclasses import replace

import comfy.model_management
import comfy.patcher_extension
import folder_paths
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from newer_hosts import dynamic
from safetensors import safe_open
from safetensors.torch import load_file
from semantic_style.benchmarks.random_models import conditioning, small_sd15, small_sdxl
from semantic_style.benchmarks.text_models import RIGHT, small_clip
from semantic_style.host.conditioning import REFERENCE
from semantic_style.host.invert import InversionTask as InversionTask
from semantic_style.host.invert import invert_ddim
from semantic_style.host.learn_word import LearningTask, learn_embedding
from semantic_style.host.pseudo_words import make_prompt
from semantic_style.nodes.nodes_embedding import SpinEmbedding
from semantic_style.nodes.nodes_paperland import LoadPaperland
from semantic_style.paperland import scenes
from semantic_style.regions.masks import mask_on_grid
from semantic_style.samplers.word_learning import LearningSettings

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

FAST = LearningSettings(steps=6, learning_rate=5e-3, checks=2)


@pytest.fixture(autouse=True)
def embeddings(tmp_path, monkeypatch):
    """The embeddings folder, empty."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return small_sd15()


@pytest.fixture(scope="module")
def clip():
    with torch.inference_mode():
        return small_clip("sd1")


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return LoadPaperland.execute("fp32").result


def latent(*shape, seed=0):
    return torch.randn(*(shape or (1, 4, 8, 8)), generator=torch.Generator().manual_seed(seed)) / 0.18215


def task(model, clip, **changes):
    prompt = make_prompt(clip, changes.pop("template", "<it>"), "house", 2)
    return LearningTask(model, prompt, **({"latent": latent(), "settings": FAST} | changes))


def run_node(model, clip, **changes):
    given = {"class_word": "house", "tokens": 2, "steps": 4, "learning_rate": 5e-3, "batch": 1, "seed": 0}
    given |= {"name": "spin", "latent": {"samples": latent()}} | changes
    return SpinEmbedding.execute(model, clip, **given).result


def stock(model, clip, text="a house"):
    import nodes

    encoder = nodes.NODE_CLASS_MAPPINGS["CLIPTextEncode"]()
    positive, negative = encoder.encode(clip, text)[0], encoder.encode(clip, "")[0]
    image = {"samples": torch.zeros(1, *model_channels(model), 8, 8)}
    return nodes.common_ksampler(model, 5, 3, 4.0, "euler", "normal", positive, negative, image)[0]["samples"]


def model_channels(model):
    return (model.get_model_object("latent_format").latent_channels,)


@pytest.mark.parametrize("kind", ["sd1", "sd2, v", "sdxl"])
def test_a_run_leaves_everything_as_it_was(kind):
    model = {
        "sd1": lambda: small_sd15(),
        "sd2, v": lambda: small_sd15(model_type="V_PREDICTION", linear=True),
        "sdxl": lambda: small_sdxl(pooled=RIGHT),
    }[kind]()
    clip = small_clip(kind[:4].rstrip(","))
    before, state = stock(model, clip), {k: v.clone() for k, v in clip.get_sd().items()}
    out = learn_embedding(task(model, clip, template="a (<it>:1.2)", latent=latent(1, 4, 10, 7)))
    assert set(out.judged) == {0, 3, 6}
    assert len(set(out.judged.values())) == 3
    assert len(out.losses) == 6
    assert all(not v.is_inference() and v.device.type == "cpu" for v in out.vectors.values())
    assert out.before.shape == out.after.shape == (4, 10, 7)
    assert torch.equal(stock(model, clip), before)
    assert all(torch.equal(v, state[k]) for k, v in clip.get_sd().items())
    assert not model.additional_models
    assert not model.wrappers


def test_same_seed_same_embedding_whatever_ran_before(model, clip):
    one = learn_embedding(task(model, clip))
    torch.randn(5)
    stock(model, clip)
    same = learn_embedding(task(model, clip))
    other = learn_embedding(task(model, clip, settings=replace(FAST, seed=1)))
    assert torch.equal(one.vectors["clip_l"], same.vectors["clip_l"])
    assert one.losses == same.losses
    assert not torch.equal(one.vectors["clip_l"], other.vectors["clip_l"])


def test_learning_where_weights_memory_is_used_again(model, clip, caplog):
    lent = small_clip("sd1")
    lent.patcher = dynamic(lent.patcher, inference=False)
    plain = learn_embedding(task(model, clip))
    assert "checkpointed" not in caplog.text
    with caplog.at_level(logging.INFO):
        learned = learn_embedding(task(dynamic(small_sd15(), inference=False), lent))
    assert "the gradient is checkpointed" in caplog.text
    assert torch.allclose(learned.vectors["clip_l"], plain.vectors["clip_l"], atol=1e-4)
    assert learned.losses == pytest.approx(plain.losses, rel=1e-4)


def test_checkpointing_learns_the_same(model, clip):
    plain, saving = (learn_embedding(task(model, clip, checkpointing=on)) for on in (False, True))
    assert torch.allclose(plain.vectors["clip_l"], saving.vectors["clip_l"], atol=1e-4)
    assert plain.losses == pytest.approx(saving.losses, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(clip, dtype):
    out = learn_embedding(task(small_sd15(dtype=dtype), clip))
    exact = learn_embedding(task(small_sd15(), clip))
    moved = [
        (o.vectors["clip_l"] - make_prompt(clip, "<it>", "house", 2).start["clip_l"]).flatten() for o in (out, exact)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.8
    assert out.vectors["clip_l"].dtype == torch.float32


def test_the_mask_reaches_the_loss(model, clip):
    where = torch.zeros(1, 8, 8)
    where[:, :4] = 1
    masked = learn_embedding(task(model, clip, saliency=where))
    whole = learn_embedding(task(model, clip))
    assert not torch.equal(masked.vectors["clip_l"], whole.vectors["clip_l"])
    assert masked.judged[0] != whole.judged[0]


def counting(model, seen, act=lambda n: None):
    """A clone whose calls are counted, and which acts after each: within one, hosts differ in when they ask."""

    def wrapper(executor, *args, **kwargs):
        options = args[5] if len(args) > 5 else kwargs["transformer_options"]
        seen.append(options)
        out = executor(*args, **kwargs)
        act(len(seen))
        return out

    clone = model.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return clone


def test_attention_patches_are_left_aside_and_wrappers_stay(model, clip):
    def refuse(*_):
        raise AssertionError("an attention patch was called")

    seen = []
    patched = counting(model, seen)
    patched.set_model_attn2_patch(refuse)
    patched.set_model_attn1_patch(refuse)
    out = learn_embedding(task(patched, clip))
    assert torch.equal(out.vectors["clip_l"], learn_embedding(task(model, clip)).vectors["clip_l"])
    assert len(seen) == 6 + 3
    assert all(options[REFERENCE] for options in seen)
    assert "attn2_patch" in patched.model_options["transformer_options"]["patches"]


def test_a_step_cache_is_left_aside(model, clip):
    cached = EasyCacheNode.execute(model, 1e9, 0.0, 1.0, False)[0]
    assert learn_embedding(task(cached, clip)).losses == learn_embedding(task(model, clip)).losses


def test_weights_patches_count(model, clip):
    patched = model.clone()
    key = next(k for k in model.model.state_dict() if k.endswith("attn2.to_v.weight"))
    weight = model.model.state_dict()[key]
    patched.add_patches({key: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)),))}, 1.0)
    one, other = (learn_embedding(task(m, clip)) for m in (model, patched))
    assert one.judged[0] != other.judged[0]
    assert learn_embedding(task(model, clip)).judged == one.judged


def test_cancelling_stops_within_a_step_and_keeps_what_was_learnt(model, clip, embeddings, caplog):
    before, seen = stock(model, clip), []
    # The first call judges the start, one step each follows.
    cancelling = counting(model, seen, lambda n: n == 4 and comfy.model_management.interrupt_current_processing())
    with pytest.raises(comfy.model_management.InterruptProcessingException), caplog.at_level(logging.INFO):
        run_node(cancelling, clip, steps=50, name="mine")
    assert len(seen) == 4
    assert [f.name for f in embeddings.iterdir()] == ["mine_cancelled.safetensors"]
    assert "mine_cancelled.safetensors" in caplog.text
    kept = load_file(embeddings / "mine_cancelled.safetensors")["emb_params"]
    # The step during which it was cancelled is done: nothing asks before the next call.
    whole = learn_embedding(
        task(model, clip, settings=LearningSettings(steps=3, learning_rate=5e-3, batch=1, checks=1))
    )
    assert torch.equal(kept, whole.vectors["clip_l"]) or whole.step == 0
    assert torch.equal(stock(model, clip), before)


def test_a_run_that_fails_keeps_what_was_learnt(model, clip, embeddings):
    before = stock(model, clip)

    def fail(n):
        if n == 5:
            raise MemoryError("on purpose")

    with pytest.raises(MemoryError):
        run_node(counting(model, [], fail), clip, steps=50)
    assert [f.name for f in embeddings.iterdir()] == ["spin_cancelled.safetensors"]
    assert torch.equal(stock(model, clip), before)


def test_what_fails_after_learning_does_not_lose_the_word(model, clip, embeddings, monkeypatch, caplog):
    expected, name, _ = run_node(model, clip)
    assert name == "embedding:spin"

    class OutOfMemory:
        def decode(self, _):
            raise RuntimeError("no memory left")

    conditioning, name, report = run_node(model, clip, vae=OutOfMemory())
    assert name == "embedding:spin_2"
    assert report.shape == (1, 600, 900, 3)
    assert torch.equal(conditioning[0][0], expected[0][0])
    assert "The report failed (RuntimeError: no memory left)" in caplog.text

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("semantic_style.nodes.nodes_embedding.save_embedding", full)
    conditioning, name, _ = run_node(model, clip)
    assert torch.equal(conditioning[0][0], expected[0][0])
    assert name == "", "no prompt shall name what is not there"
    assert "Saving embedding:spin failed" in caplog.text
    assert len(list(embeddings.iterdir())) == 2


def test_a_cancelled_run_that_cannot_be_saved_is_a_cancelled_run(model, clip, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("semantic_style.nodes.nodes_embedding.save_embedding", full)
    cancelling = counting(model, [], lambda n: n == 4 and comfy.model_management.interrupt_current_processing())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_node(cancelling, clip, steps=50, name="mine")
    assert "Saving what was learnt failed" in caplog.text


def test_a_run_cancelled_at_once_leaves_no_file(model, clip, embeddings):
    cancelling = counting(model, [], lambda n: comfy.model_management.interrupt_current_processing())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_node(cancelling, clip)
    assert not list(embeddings.iterdir())


def test_the_node_s_outputs(model, clip, embeddings):
    clip = clip.clone()
    clip.tokenizer.clip_l.embedding_directory = [str(embeddings)]
    made, name, report = run_node(model, clip, template="a photo of <it>")
    assert name == "embedding:spin"
    import nodes

    typed = nodes.NODE_CLASS_MAPPINGS["CLIPTextEncode"]().encode(clip, f"a photo of {name}")[0]
    assert torch.equal(made[0][0], typed[0][0])
    assert report.shape == (1, 600, 900, 3)
    assert not report.is_inference()
    with safe_open(embeddings / "spin.safetensors", "pt") as file:
        said = file.metadata()
    assert said["class_word"] == "house"
    assert said["template"] == "a photo of <it>"
    assert "4 steps" in said["learned"]


def test_a_name_that_is_taken_gets_a_number_unless_told_otherwise(model, clip, embeddings):
    names = [run_node(model, clip, steps=1)[1] for _ in range(2)]
    names.append(run_node(model, clip, steps=2, overwrite=True)[1])
    assert names == ["embedding:spin", "embedding:spin_2", "embedding:spin"]
    assert sorted(f.name for f in embeddings.iterdir()) == ["spin.safetensors", "spin_2.safetensors"]
    one, two = (load_file(f)["emb_params"] for f in sorted(embeddings.iterdir()))
    assert not torch.equal(one, two)


def test_a_replaced_word_is_said_to_stay_in_prompts_that_were_typed(model, clip, caplog):
    said = "keep the old word until their text changes"
    new = run_node(model, clip, overwrite=True)[2]
    assert said not in caplog.text
    again = run_node(model, clip, overwrite=True)[2]
    assert f"embedding:spin replaced: prompts that were run {said}" in caplog.text
    differing = (new != again).flatten(0, 1).any(dim=-1) if new.ndim == 3 else (new != again)[0].any(dim=-1)
    assert differing[:22].any(), "a line above"
    assert not differing[30:].any(), "the same run otherwise"


def test_a_mask_of_another_size_counts_by_area(model, clip):
    mask = torch.zeros(1, 30, 44)
    mask[:, 5:19, 7:33] = 1
    run_node(model, clip, saliency=mask, name="a")
    run_node(model, clip, saliency=mask_on_grid(mask, (8, 8)), name="b")
    run_node(model, clip, saliency=torch.ones(30, 44), name="c")
    run_node(model, clip, name="d")
    folder = folder_paths.get_folder_paths("embeddings")[0]
    a, b, c, d = (load_file(f"{folder}/{name}.safetensors")["emb_params"] for name in "abcd")
    assert torch.equal(a, b)
    assert torch.allclose(c, d, atol=1e-6)
    assert not torch.allclose(a, c, atol=1e-6)


def test_pictures_with_an_empty_mask_are_left_out_and_named(model, clip, caplog):
    frames, mask = torch.cat([latent(), latent(seed=2), latent(seed=3)]), torch.zeros(3, 8, 8)
    mask[0, 2:5] = mask[2, 3:7] = 1
    first, _, report = run_node(model, clip, latent={"samples": frames}, saliency=mask)
    assert "left out, their masks being empty: 2 of 3 pictures" in caplog.text
    kept = [0, 2]
    alone, _, other = run_node(model, clip, latent={"samples": frames[kept]}, saliency=mask[kept])
    assert torch.equal(first[0][0], alone[0][0])
    assert not torch.equal(report, other), "the report says it"
    with pytest.raises(ValueError, match="empty"):
        run_node(model, clip, latent={"samples": frames}, saliency=0 * mask)


def test_an_inversion_or_an_image_in_the_latent_s_place(model, clip, demo):
    inversion = invert_ddim(InversionTask(model, conditioning(1), conditioning(1), latent(), 2, "normal", 1.0, 0))
    run_node(model, clip, name="a", latent=None, inversion=inversion)
    run_node(model, clip, name="b")
    folder = folder_paths.get_folder_paths("embeddings")[0]
    a, b = (load_file(f"{folder}/{name}.safetensors")["emb_params"] for name in "ab")
    assert torch.allclose(a, b, atol=1e-5)
    other = small_sd15(model_channels=64)
    with pytest.raises(ValueError, match="another kind of model"):
        run_node(other, clip, latent=None, inversion=inversion)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": None}, "got none"),
        ({"image": torch.zeros(1, 64, 64, 3)}, "got latent and image"),
        ({"latent": None, "image": torch.zeros(1, 64, 64, 3)}, "needs a vae"),
        ({"latent": {"samples": torch.zeros(1, 48, 8, 8)}}, "channels"),
        ({"latent": {"samples": torch.full((1, 4, 8, 8), float("nan"))}}, "NaN"),
        ({"saliency": torch.zeros(1, 64, 64)}, "empty"),
        ({"saliency": torch.full((1, 64, 64), float("nan"))}, "not finite"),
        ({"saliency": torch.ones(3, 64, 64)}, "one for each picture"),
        ({"saliency": torch.eye(64)[None] * (torch.arange(64) == 3)}, "covers 0.0156 positions"),
        ({"template": "a house"}, "must contain <it>"),
        ({"class_word": " "}, "class_word must be"),
        ({"name": "../spin"}, "name has letters"),
        ({"tokens": 0}, "at least 1"),
        ({"steps": 0}, "steps must be"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_refusals_come_before_any_model_call(model, clip, embeddings, changes, message):
    def refuse(n):
        raise AssertionError("the model was called")

    with pytest.raises(ValueError, match=message):
        run_node(counting(model, [], refuse), clip, **changes)
    assert not list(embeddings.iterdir())


def test_flow_models_and_motion_modules_are_refused(model, clip):
    import comfy_extras.nodes_model_advanced as advanced

    flow = advanced.ModelSamplingSD3().patch(model, 3.0)[0]
    with pytest.raises(ValueError, match="is a flow model: what works"):
        run_node(flow, clip)
    moving = model.clone()
    moving.set_injections("motion", [comfy.model_patcher.PatcherInjection(lambda _: None, lambda _: None)])
    with pytest.raises(ValueError, match="AnimateDiff"):
        run_node(moving, clip)


def test_of_several_folders_the_first_that_can_be_written_is_taken(model, clip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "file", tmp_path / "mine", tmp_path / "other"]
    paths = ([str(folder) for folder in folders], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", paths)
    assert run_node(model, clip)[1] == "embedding:spin"
    assert [f.name for f in folders[1].iterdir()] == ["spin.safetensors"]
    assert not folders[2].exists()


def test_overwriting_replaces_the_file_where_it_is(model, clip, embeddings, monkeypatch):
    (embeddings / "below").mkdir()
    (embeddings / "below" / "spin.safetensors").write_bytes(b"old")
    assert run_node(model, clip, overwrite=True)[1] == "embedding:spin"
    assert [f.name for f in embeddings.iterdir()] == ["below"], "or a prompt would find either"
    assert (embeddings / "below" / "spin.safetensors").read_bytes() != b"old"

    def open_elsewhere(path, *_):
        if path.name == "spin.safetensors":
            raise PermissionError(13, "being used by another process")
        path.write_bytes(b"new")

    monkeypatch.setattr("semantic_style.nodes.nodes_embedding.save_embedding", open_elsewhere)
    assert run_node(model, clip, overwrite=True)[1] == "embedding:spin_2"
    assert (embeddings / "spin_2.safetensors").read_bytes() == b"new"


def test_a_folder_that_cannot_be_written_is_said_before_the_run(model, clip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path / "file")], set()))
    with pytest.raises(ValueError, match="nothing can be written"):
        run_node(counting(model, [], lambda n: 1 / 0), clip)


def test_on_paperland_the_masked_loss_beats_the_class_word_s(demo):
    """And `embedding:name house` in any caption is what was learnt."""
    model, clip, vae = demo
    drawn = scenes.single("house", 3, 5, (64, 64))
    subject = sum((drawn.labels == scenes.REGIONS.index(r)).float() for r in ("house", "roof"))
    made, name, _ = run_node(
        model, clip, latent=None, image=drawn.images, vae=vae, saliency=subject, steps=16, learning_rate=0.1
    )
    assert name == "embedding:spin"
    folder = folder_paths.get_folder_paths("embeddings")[0]
    with safe_open(f"{folder}/spin.safetensors", "pt") as file:
        said = file.metadata()
        assert file.get_tensor("emb_params").shape == (2, 128)
    assert said["template"] == "<it> house"
    assert "(-" in said["learned"], said["learned"]
    clip = LoadPaperland.execute("fp32").result[1]
    import nodes

    typed = nodes.NODE_CLASS_MAPPINGS["CLIPTextEncode"]().encode(clip, "embedding:spin house")[0]
    assert torch.equal(made[0][0], typed[0][0])
