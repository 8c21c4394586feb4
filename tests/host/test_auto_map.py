"""Automatic maps through the host: what the model is asked, what comes out, what is refused."""

from dataclasses import replace

import comfy.model_management
import comfy.patcher_extension
import pytest
import torch
from semantic_style.attention.layers import feature_blocks
from semantic_style.benchmarks.agreement import agreement
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.host.auto_map import MapRequest, auto_map
from semantic_style.host.invert import InversionTask, invert_ddim
from semantic_style.host.small_model import unet_model
from semantic_style.nodes.nodes_auto_map import AutoMap
from semantic_style.paperland import model as paperland
from semantic_style.paperland import scenes
from semantic_style.regions.clustering import cluster, joint_vectors
from semantic_style.samplers.features import FeatureTap

pytestmark = pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")

EMPTY, OTHER = conditioning(3), conditioning(4)
SIZE = (16, 8)


@pytest.fixture(scope="module")
def model():
    return small_sd15()


def invert(model, seed, rows=1, size=SIZE, prompt=EMPTY):
    image = torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(seed)) / 0.18215
    return invert_ddim(InversionTask(model, prompt, prompt, image, 2, "normal", 1.0, 0))


@pytest.fixture(scope="module")
def request_(model):
    with torch.inference_mode():
        return MapRequest(model, invert(model, 1), invert(model, 2, size=(8, 16)), regions=4)


class Calls:
    """The shapes of what the network itself was called with."""

    def __init__(self, model):
        self.seen = []
        network = model.model.diffusion_model
        self.handle = network.register_forward_pre_hook(lambda _, args: self.seen.append(tuple(args[0].shape)))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self.handle.remove()


def test_map_on_the_features_grid(request_):
    with Calls(request_.model) as seen:
        found, clusterings = auto_map(request_)
    assert found.content.shape == (1, *SIZE)
    assert found.style.shape == (1, 8, 16)
    assert 2 <= clusterings[0].count <= 4
    assert seen == [(1, 4, *SIZE), (1, 4, 8, 16)]
    again, _ = auto_map(request_)
    assert torch.equal(found.content, again.content)
    assert torch.equal(found.style, again.style)
    # What lives on in the graph can be part of another node's gradients.
    assert not found.content.is_inference()
    assert not found.style.is_inference()


@pytest.fixture(scope="module")
def demo():
    net = paperland.load()
    host = unet_model(
        "Paperland", net.unet.config.host(), net.unet.state_dict(), rgb_factors=paperland.preview_factors()
    )
    return net, host


def test_same_as_without_the_host_on_the_demo_model(demo):
    net, host = demo
    empty = [[net.text([""]), {}]]
    a, b = scenes.scene(5, 6), scenes.scene(7, 8)
    content, style = (
        invert_ddim(InversionTask(host, empty, empty, paperland.encode_pixels(s.images), 2, "normal", 1.0, 0))
        for s in (a, b)
    )
    request = MapRequest(host, content, style, sigma=0.5, seed=3)
    found, clusterings = auto_map(request)
    sides = []
    for inversion in (content, style):
        tap = FeatureTap(feature_blocks(net.unet))
        noise = torch.randn(48, 32, 32, generator=torch.Generator().manual_seed(3))
        net(inversion.clean + 0.5 * noise, torch.tensor([0.5]), net.text([""]), tap.options())
        sides.append(joint_vectors([tap.features[i] for i in tap.blocks]))
    expected = cluster(*sides, seed=3)
    assert clusterings[0].silhouettes == pytest.approx(expected.silhouettes, abs=1e-3)
    same = torch.cat(
        [(found.content == expected.regions.content).flatten(), (found.style == expected.regions.style).flatten()]
    )
    # The two UNets round differently; a place between two regions may fall to either side.
    assert same.float().mean() > 0.99
    at = found.at((128, 128), (128, 128))
    figures = agreement(at.content[0], at.style[0], a.labels[0], b.labels[0])
    assert figures["joint"] > 0.2


def test_several_contents_share_labels_with_one_style_pairs_do_not(model, request_):
    frames = invert(model, 6, rows=3)
    found, clusterings = auto_map(replace(request_, content=frames))
    assert found.content.shape == (3, *SIZE)
    assert found.style.shape == (1, 8, 16)
    assert len(clusterings) == 1
    styles = invert(model, 7, rows=3)
    found, clusterings = auto_map(replace(request_, content=frames, style=styles))
    assert found.style.shape == (3, *SIZE)
    assert len(clusterings) == 3
    assert torch.equal(found.content[1:2], clusterings[1].regions.content)


def test_attention_patches_and_wrappers_are_left_aside(model, request_):
    plain, _ = auto_map(request_)
    patched = model.clone()
    patched.set_model_attn1_patch(lambda q, k, v, extra: (q * 0, k, v))
    patched.set_model_attn2_replace(lambda q, k, v, extra: q * 0, "output", 4)

    def refuse(*_args, **_kwargs):
        raise AssertionError("a wrapper of the pack was called")

    for kind in (comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, comfy.patcher_extension.WrappersMP.CALC_COND_BATCH):
        patched.add_wrapper_with_key(kind, "semantic_style_scsa", refuse)
    found, _ = auto_map(replace(request_, model=patched))
    assert torch.equal(found.content, plain.content)
    # The model itself keeps what is on it.
    assert patched.model_options["transformer_options"]["patches"]["attn1_patch"]
    assert patched.get_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "semantic_style_scsa")


def test_the_prompt_counts(model, request_):
    own, _ = auto_map(request_)
    without = replace(
        request_, content=replace(request_.content, positive=None), style=replace(request_.style, positive=None)
    )
    with pytest.raises(ValueError, match="content's inversion has no prompt"):
        auto_map(without)
    same, _ = auto_map(replace(without, conditioning=EMPTY))
    assert torch.equal(same.content, own.content)
    other, _ = auto_map(replace(request_, conditioning=[[OTHER[0][0] * 20, {}]], smoothing=0))
    own, _ = auto_map(replace(request_, smoothing=0))
    assert not (torch.equal(other.content, own.content) and torch.equal(other.style, own.style))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": 1}, "2 to 16, got 1"),
        ({"smoothing": -1}, "got -1"),
        ({"sigma": 0.0}, "above 0, got 0.0"),
        ({"sigma": float("nan")}, "got nan"),
    ],
)
def test_settings_are_refused_before_any_call(model, request_, change, message):
    with Calls(model) as seen, pytest.raises(ValueError, match=message):
        auto_map(replace(request_, **change))
    assert not seen


def test_inversions_that_do_not_go_together_are_refused(model, request_):
    with pytest.raises(ValueError, match="2 contents and 3 styles"):
        auto_map(replace(request_, content=invert(model, 6, rows=2), style=invert(model, 7, rows=3)))
    other = small_sd15(seed=5)
    with pytest.raises(ValueError, match="another checkpoint"):
        auto_map(replace(request_, model=other))
    found, _ = auto_map(replace(request_, model=other, allow_other_model=True))
    assert found.content.shape == (1, *SIZE)
    with pytest.raises(ValueError, match="another kind of model"):
        auto_map(replace(request_, model=small_sd15(64), allow_other_model=True))


def test_features_that_are_not_finite_are_an_error(model, request_):
    # The host calls a block's layers one by one, never the block.
    upsampling = model.model.diffusion_model.output_blocks[5][-1]
    broken = upsampling.register_forward_hook(lambda module, args, out: out * torch.nan)
    try:
        with pytest.raises(FloatingPointError, match="content's features"):
            auto_map(request_)
    finally:
        broken.remove()


def test_a_run_can_be_cancelled(model, request_):
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            auto_map(request_)
    finally:
        comfy.model_management.interrupt_current_processing(False)


def test_node_reports_what_it_found(request_):
    out = AutoMap.execute(request_.model, request_.content, request_.style, 0, 1, 0)
    found, report = out.result
    assert found.content.shape == (1, *SIZE)
    assert "mean silhouette by number of regions: 2: " in report
    assert "of the content" in report
    given = AutoMap.execute(request_.model, request_.content, request_.style, 3, 1, 0).result[1]
    assert "silhouette" not in given
