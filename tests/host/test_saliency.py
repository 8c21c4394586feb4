"""Find Subject through the host: what the model is asked, what comes out, what is refused."""

from dataclasses import replace

import comfy.model_management
import pytest
import torch
import torch.nn.functional as F
from semantic_style.attention.layers import feature_blocks
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.benchmarks.saliency_quality import FOUND, overlap
from semantic_style.host.find_subject import SubjectRequest, find_subjects, pixel_size
from semantic_style.host.invert import InversionTask, invert_ddim
from semantic_style.nodes.nodes_paperland import LoadPaperland
from semantic_style.nodes.nodes_saliency import FindSubject
from semantic_style.paperland import model as paperland
from semantic_style.paperland import scenes
from semantic_style.regions.saliency import find_subject
from semantic_style.samplers.features import FeatureTap

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

EMPTY = conditioning(3)
SIZE = (16, 12)


@pytest.fixture(scope="module")
def model():
    return small_sd15()


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return LoadPaperland.execute("fp32").result


@pytest.fixture(scope="module")
def house():
    return scenes.single("house", 5, 5005)


def latent(rows=1, size=SIZE, seed=1):
    """With something in the middle, so that random weights see a thing."""
    samples = 0.1 * torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(seed))
    samples[:, :, 5:10, 4:8] += 8
    return samples


def run(model, **inputs):
    given = {"sigma": 0.3, "threshold": 0.5, "mode": "hard", "grow": 0, "looks": 1, "seed": 0, **inputs}
    return FindSubject.execute(model, **given).result


def test_same_as_without_the_host_on_the_demo_model(demo, house):
    model, clip, _ = demo
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    clean = paperland.encode_pixels(house.images)
    mask, preview, report = run(model, latent={"samples": clean}, prompt=empty, looks=2, seed=7, image=house.images)
    net = paperland.load()
    features = []
    for seed in (7, 8):
        tap = FeatureTap(feature_blocks(net.unet))
        noise = torch.randn(48, 32, 32, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode(False), torch.no_grad():
            net(clean.clone() + 0.3 * noise, torch.tensor([0.3]), net.text([""]), tap.options())
        features.append(F.normalize(tap.features[tap.blocks[-1]], dim=1))
    expected = find_subject((features[0] + features[1])[0]).hard
    up = F.interpolate(expected[None, None].float(), (128, 128), mode="bilinear")[0, 0] > 0.5
    # The two UNets round differently; a place at the edge may fall to either side.
    assert (mask[0].bool() == up).float().mean() > 0.99
    assert mask.shape == (1, 128, 128)
    assert preview.shape == (1, 128, 128, 3)
    assert (preview[0][~up] < house.images[0][~up] + 1e-6).float().mean() > 0.9
    assert f"covers {mask.mean():.1%} of the picture" in report
    assert pixel_size(model, clean) == (128, 128)
    # The right way up: what the benchmark calls found. How often that is so it measures.
    assert overlap(mask[0].bool(), scenes.object_mask(house.labels)[0].bool()) > FOUND


def test_pictures_that_do_not_fit_the_memory_together_are_looked_at_apart(model, monkeypatch):
    given = {"latent": {"samples": latent(5)}, "prompt": EMPTY, "mode": "soft"}
    expected, real, calls = run(model, **given)[0], model.model.apply_model, []

    def small(x, *args, **kwargs):
        if len(x) > 2:
            raise torch.cuda.OutOfMemoryError("too big")
        calls.append(len(x))
        return real(x, *args, **kwargs)

    monkeypatch.setattr(model.model, "apply_model", small)
    torch.testing.assert_close(run(model, **given)[0], expected, rtol=0, atol=1e-2)
    assert calls == [2, 2, 1]
    single = [[EMPTY[0][0].repeat(5, 1, 1), {}]]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(model, **{**given, "prompt": single})


def test_the_mask_of_a_picture_with_odd_sides_lies_where_it_was_seen(model):
    """A latent of 16x12 places stands for the middle 128x96 of 135x101 pixels."""
    given = {"latent": {"samples": latent()}, "prompt": EMPTY}
    expected, odd = (run(model, **given, image=torch.zeros(1, *size, 3))[0] for size in ((128, 96), (135, 101)))
    assert odd.shape == (1, 135, 101)
    assert torch.equal(odd[:, 3:131, 2:98], expected)


def test_a_preview_that_fails_does_not_lose_the_mask(model, monkeypatch):
    given = {"latent": {"samples": latent()}, "prompt": EMPTY}
    expected = run(model, **given)[0]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("semantic_style.nodes.nodes_saliency.ui.PreviewImage", full)
    mask, preview, report = run(model, **given)
    assert torch.equal(mask, expected)
    assert "Showing the preview failed" in report
    assert "The preview failed" not in report
    monkeypatch.setattr("semantic_style.nodes.nodes_saliency.overlay_subject", full)
    mask, preview, report = run(model, **given)
    assert torch.equal(mask, expected)
    assert preview.shape == (1, 128, 96, 3)
    assert "The preview failed" in report


def test_a_mask_for_each_picture_in_pixels(model):
    both = {"samples": torch.cat([latent(), latent(seed=2)])}
    mask, preview, report = run(model, latent=both, prompt=EMPTY)
    assert mask.shape == (2, 128, 96)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert preview.shape == (2, 128, 96, 3)
    assert report.count("Picture ") >= 2
    one = run(model, latent={"samples": both["samples"][1:]}, prompt=EMPTY)[0]
    assert (one == mask[1:]).float().mean() > 0.99
    again = run(model, latent=both, prompt=EMPTY)
    assert torch.equal(again[0], mask)


def test_one_picture_without_a_thing_does_not_stop_the_others(model):
    """A frame on which nothing is to be seen, and one whose subject shrinking takes away."""
    frames = torch.cat([latent(), latent(seed=2), latent(seed=3)])
    alone = run(model, latent={"samples": frames[[0, 2]]}, prompt=EMPTY)[0]

    def flatten_the_second(module, args, out):
        out = out.clone()
        out[1] = 1
        return out

    hook = model.model.diffusion_model.output_blocks[8][-1].register_forward_hook(flatten_the_second)
    try:
        mask, preview, report = run(model, latent={"samples": frames}, prompt=EMPTY)
    finally:
        hook.remove()
    assert torch.equal(mask[[0, 2]], alone)
    assert not mask[1].any()
    assert preview.shape == (3, 128, 96, 3)
    (named,) = [line for line in report.splitlines() if "no subject" in line]
    assert named.startswith("Picture 2: no subject, its mask is empty: the features are the same everywhere")


def test_what_is_left_of_one_picture_is_enough(model):
    both = {"samples": torch.cat([latent(), latent(seed=2)])}
    sizes = run(model, latent=both, prompt=EMPTY)[0]
    kept = [i for i in range(2) if run(model, latent={"samples": both["samples"][[i]]}, prompt=EMPTY)[0].any()]
    assert kept == [0, 1]
    shrunk = next(g for g in range(1, 128) if (F.max_pool2d(-sizes, 2 * g + 1, 1, g) < 0).flatten(1).any(1).sum() == 1)
    mask, _, report = run(model, latent=both, prompt=EMPTY, grow=-shrunk)
    assert mask.flatten(1).any(dim=1).sum() == 1
    assert "its mask is empty: nothing is left of the subject" in report


def test_modes_and_growing(model):
    given = {"latent": {"samples": latent()}, "prompt": EMPTY}
    hard, soft = run(model, **given)[0], run(model, mode="soft", **given)[0]
    assert len(soft.unique()) > 2
    assert soft[hard > 0].mean() > soft[hard == 0].mean() + 0.3
    larger, smaller = run(model, grow=3, **given)[0], run(model, grow=-3, **given)[0]
    assert (larger >= hard).all()
    assert (smaller <= hard).all()
    assert smaller.sum() < hard.sum() < larger.sum()
    assert torch.equal(larger, F.max_pool2d(hard, 7, 1, 3))
    with pytest.raises(ValueError, match="nothing is left of the subject"):
        run(model, grow=-256, **given)


def test_an_inversion_serves_with_its_own_prompt(model):
    inverted = invert_ddim(InversionTask(model, EMPTY, EMPTY, latent(), 2, "normal", 1.0, 0))
    a = run(model, inversion=inverted)[0]
    b = run(model, latent={"samples": latent()}, prompt=EMPTY)[0]
    assert (a == b).float().mean() > 0.99
    without = replace(inverted, positive=None)
    with pytest.raises(ValueError, match="connect a prompt"):
        run(model, inversion=without)
    other = small_sd15(seed=5)
    with pytest.raises(ValueError, match="another checkpoint"):
        run(other, inversion=inverted)
    assert run(other, inversion=inverted, allow_other_model=True)[0].shape == (1, 128, 96)


class Calls:
    """How often the network itself was called."""

    def __init__(self, model):
        self.count = 0
        self.handle = model.model.diffusion_model.register_forward_pre_hook(self.note)

    def note(self, *_):
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "firm"}, "'firm'; choose one of hard, soft"),
        ({"threshold": 1.0}, "below 1, got 1.0"),
        ({"sigma": 0.0}, "above 0, got 0.0"),
        ({"looks": 0}, "1 or more, got 0"),
        ({"grow": 1000}, "got 1000"),
        ({"latent": None}, "neither is connected"),
        ({"prompt": None}, "connect a prompt"),
        ({"latent": {"samples": torch.zeros(1, 16, 8, 8)}}, "takes 4 channels"),
        ({"latent": {"samples": torch.full((1, 4, 8, 8), torch.nan)}}, "NaN"),
        ({"image": torch.zeros(1, 128, 300, 3)}, "do not show the same"),
        ({"image": torch.zeros(3, 128, 96, 3)}, "a batch of 3 pictures"),
    ],
)
def test_refused_before_any_call(model, change, message):
    with Calls(model) as calls, pytest.raises(ValueError, match=message):
        run(model, **{"latent": {"samples": latent()}, "prompt": EMPTY, **change})
    assert calls.count == 0


def test_looks_are_calls_and_the_model_stays_as_it_is(model):
    import nodes

    def sampled():
        return nodes.NODE_CLASS_MAPPINGS["KSampler"]().sample(
            model, 1, 2, 2.0, "euler", "normal", EMPTY, EMPTY, {"samples": latent()}
        )[0]["samples"]

    before = sampled()
    with Calls(model) as calls:
        find_subjects(SubjectRequest(model, latent(), EMPTY, looks=3))
    assert calls.count == 3
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        find_subjects(SubjectRequest(model, latent(), EMPTY))
    comfy.model_management.interrupt_current_processing(False)
    assert torch.equal(sampled(), before)


def test_a_picture_without_a_thing_is_an_error(model):
    upsampling = model.model.diffusion_model.output_blocks[8][-1]
    flat = upsampling.register_forward_hook(lambda module, args, out: torch.ones_like(out))
    try:
        with pytest.raises(ValueError, match=r"^the features are the same everywhere"):
            run(model, latent={"samples": latent()}, prompt=EMPTY)
        with pytest.raises(ValueError, match=r"in none of the 2 pictures .* same everywhere"):
            run(model, latent={"samples": latent(2)}, prompt=EMPTY)
    finally:
        flat.remove()
    broken = upsampling.register_forward_hook(lambda module, args, out: out * torch.nan)
    try:
        with pytest.raises(FloatingPointError, match="float32"):
            find_subjects(SubjectRequest(model, latent(), EMPTY))
    finally:
        broken.remove()
