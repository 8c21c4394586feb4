"""What a run shows while it goes on: a preview at every step, and the time that is left."""

import asyncio
import json
import struct
import sys
from types import SimpleNamespace

import aiohttp
import comfy.utils
import folder_paths
import latent_preview
import pytest
import torch
from comfy_extras.nodes_custom_sampler import CFGGuider, KSamplerSelect, SamplerCustomAdvanced
from semantic_style.benchmarks.random_models import conditioning, small_sd15
from semantic_style.benchmarks.text_models import small_clip
from semantic_style.host import progress
from semantic_style.host.progress import TimeLeft, as_time
from semantic_style.nodes.nodes_embedding import SpinEmbedding
from semantic_style.nodes.nodes_inversion import DDIMInversion, DDPMInversion, Replay
from semantic_style.nodes.nodes_semantix import AS_SET, Guider, KSampler, SemantixEnergy
from semantic_style.runner.api import Api

PROMPT, EMPTY = conditioning(1), conditioning(2)
STEPS = 3
WEIGHTS = (AS_SET, 3.0, 0.9, 0.0, 0.0)
SECONDS = 120
TEXT = 3  # of the host's binary messages


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def lines(clock, steps, total):
    """What is said after steps that end at these times."""
    said = []
    left = TimeLeft(said.append, clock)
    for done, now in steps:
        clock.now = now
        left.update(done, total)
    return said


def test_the_first_step_does_not_count_for_the_rest(clock):
    assert lines(clock, [(1, 160), (2, 162), (3, 164), (10, 178)], 10) == [
        "step 1 of 10, 9:00 left",
        "step 2 of 10, 16 s left",
        "step 3 of 10, 14 s left",
        "10 steps in 1:18",
    ]


def test_steps_may_come_several_at_once_and_more_than_once(clock):
    assert lines(clock, [(4, 108), (8, 112), (8, 113), (12, 116)], 12) == [
        "step 4 of 12, 16 s left",
        "step 8 of 12, 4 s left",
        "step 8 of 12, 5 s left",
        "12 steps in 16 s",
    ]


def test_quick_steps_are_not_all_told_but_the_last_is(clock):
    said = lines(clock, [(i, 100 + i / 10) for i in range(1, 21)], 20)
    assert [line.split()[1] for line in said[:-1]] == ["5", "10", "15"]
    assert said[-1] == "20 steps in 2 s"


def test_times_in_words():
    assert [as_time(s) for s in (0.2, 59.4, 59.6, 125, 3609)] == ["0 s", "59 s", "1:00", "2:05", "1:00:09"]


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return small_sd15()


@pytest.fixture(scope="module")
def context(model):
    with torch.inference_mode():
        return invert(model)


def image():
    return {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}


def invert(model):
    return DDPMInversion.execute(model, PROMPT, EMPTY, image(), STEPS, "normal", 1.0, 0, batch_steps=1).args[0]


def invert_ddim(model, context):
    DDIMInversion.execute(model, PROMPT, EMPTY, image(), STEPS, "normal", 1.0, 0)


def restyle(model, context):
    KSampler.execute(model, PROMPT, EMPTY, context, context, 1.0, *WEIGHTS)


def replay(model, context):
    noise, sampler, sigmas, latent = Replay.execute(context, 0, True).args
    (guider,) = CFGGuider().get_guider(model, PROMPT, EMPTY, 1.0)
    SamplerCustomAdvanced().sample(noise, guider, sampler, sigmas, latent)


def guide_another_sampler(model, context):
    noise, _, sigmas, latent = Replay.execute(context, 0, True).args
    energy = SemantixEnergy.execute(context, context, *WEIGHTS, 0.0, 1.0).args[0]
    (guider,) = Guider.execute(model, PROMPT, EMPTY, 1.0, energy).args
    SamplerCustomAdvanced().sample(noise, guider, KSamplerSelect().get_sampler("euler")[0], sigmas, latent)


def learn(model, context):
    SpinEmbedding.execute(model, small_clip("sd1"), "house", 1, STEPS, 1e-2, 1, 0, "it", None, context)


RUNS = (lambda model, context: invert(model), invert_ddim, restyle, replay, guide_another_sampler, learn)
NAMES = ("invert_ddpm", "invert_ddim", "restyle", "replay", "guide_another_sampler", "learn")


@pytest.mark.usefixtures("one_thread", "as_the_host_runs_nodes")
@pytest.mark.parametrize("run", RUNS, ids=NAMES)
def test_every_step_has_a_preview_and_a_line(run, model, context, monkeypatch, tmp_path):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said, shown = [], []

    def send(text, node, client):
        said.append(text)
        assert (node, client) == ("7", "someone")

    instance = SimpleNamespace(client_id="someone", last_node_id="7", send_progress_text=send)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: shown.append((value, total, preview)))
    run(model, context)
    assert [(value, total) for value, total, _ in shown] == [(i + 1, STEPS) for i in range(STEPS)]
    assert all(preview is not None for *_, preview in shown)
    assert [line.split(",")[0] for line in said[:-1]] == [f"step {i} of {STEPS}" for i in range(1, STEPS)]
    assert said[-1].startswith(f"{STEPS} steps in ")
    instance.client_id = None
    said.clear()
    run(model, context)
    assert not said, "nobody looks"


def graph(steps):
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    return {
        "1": node("SemanticStylePaperlandModel", precision="fp32"),
        "2": node("SemanticStylePaperlandScene", layout_seed=1, style_seed=1, width=64, height=64),
        "3": node("SemanticStylePaperlandEncode", clip=["1", 1], caption=""),
        "4": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
        "5": node("SemanticStyleDDIMInversion", model=["1", 0], positive=["3", 0], negative=["3", 0], latent=["4", 0],
                  steps=steps, scheduler="normal", cfg=1.0, seed=0),
        "6": node("SemanticStyleInversionLatent", inversion=["5", 0], step=0),
        "7": node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": node("PreviewImage", images=["7", 0]),
    }  # fmt: skip


def test_the_browser_is_told_which_node_takes_how_long(comfy_server):
    """Over the websocket of a real ComfyUI."""
    said = []

    async def follow():
        async with Api(comfy_server.address) as api, aiohttp.ClientSession() as session:
            url = api.base.joinpath("ws").with_query(clientId=api.client_id)
            async with session.ws_connect(url, max_msg_size=0) as socket:
                # A length that no other run of the session's server has cached.
                prompt_id = await api.queue(graph(steps=7))
                while True:
                    message = await asyncio.wait_for(socket.receive(), SECONDS)
                    if message.type is aiohttp.WSMsgType.BINARY:
                        kind, length = struct.unpack(">II", message.data[:8])
                        if kind == TEXT:
                            said.append((message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()))
                        continue
                    content = json.loads(message.data)
                    assert content["type"] != "execution_error", content
                    if content["type"] == "execution_success" and content["data"]["prompt_id"] == prompt_id:
                        return

    asyncio.run(follow())
    assert {node for node, _ in said} == {"5"}
    assert said[-1][1].startswith("7 steps in ")
