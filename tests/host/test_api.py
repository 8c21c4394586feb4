"""Server and client of the demo with the real ComfyUI, on stock nodes."""

from __future__ import annotations

import threading
import urllib.request

import pytest
from semantic_style.runner.api import ServerGoneError
from semantic_style.runner.client import Client
from semantic_style.runner.graph import GraphError, GraphInterrupted, Progress
from semantic_style.runner.launch import free_port


def stock_graph(colour: int = 0x4080C0) -> dict:
    image = {"width": 40, "height": 24, "batch_size": 2, "color": colour}
    return {
        "1": {"class_type": "EmptyImage", "inputs": image, "_meta": {"title": "A colour"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "stock"}},
    }


def test_a_graph_gives_its_images(comfy_client: Client) -> None:
    seen: list[Progress] = []
    result = comfy_client.run(stock_graph(), progress=seen.append, timeout=60)
    images = comfy_client.images(result)
    assert list(images) == ["2"]
    assert [image.size for image in images["2"]] == [(40, 24)] * 2
    assert images["2"][0].getpixel((0, 0)) == (0x40, 0x80, 0xC0)
    assert "A colour" in [progress.title for progress in seen]
    assert seen[-1].fraction == 1


def test_a_cached_run_gives_them_again(comfy_client: Client) -> None:
    first = comfy_client.run(stock_graph(0x112233), timeout=60)
    again = comfy_client.run(stock_graph(0x112233), timeout=60)
    assert again.outputs == first.outputs


def test_a_graph_that_does_not_fit_its_nodes_is_refused_with_the_place(comfy_client: Client) -> None:
    graph = stock_graph()
    graph["1"]["inputs"]["width"] = -1
    with pytest.raises(GraphError, match=r"EmptyImage \(node 1\): .*width") as caught:
        comfy_client.run(graph, timeout=60)
    assert caught.value.node_id == "1"
    with pytest.raises(GraphError, match="NoSuchNode"):
        comfy_client.run({"1": {"class_type": "NoSuchNode", "inputs": {}}}, timeout=60)


def test_a_node_that_fails_is_an_error_with_its_message(comfy_client: Client) -> None:
    graph = stock_graph()
    graph["2"]["inputs"]["filename_prefix"] = "../outside"
    with pytest.raises(GraphError, match=r"SaveImage \(node 2\): Exception: .*outside the output folder") as caught:
        comfy_client.run(graph, timeout=60)
    assert (caught.value.node_id, caught.value.node_type) == ("2", "SaveImage")


def test_a_run_can_be_interrupted(comfy_client: Client) -> None:
    """Interrupted from another thread as soon as the sampler takes its first step."""
    graph = {
        "1": {"class_type": "SemanticStylePaperlandModel", "inputs": {"precision": "fp32"}},
        "2": {"class_type": "SemanticStylePaperlandEncode", "inputs": {"clip": ["1", 1], "caption": ""}},
        "3": {"class_type": "SemanticStylePaperlandLatent", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["2", 0],
                "latent_image": ["3", 0],
                "seed": 1,
                "steps": 2000,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    }
    stepping = threading.Event()

    def interrupt() -> None:
        if stepping.wait(60):
            with Client(comfy_client.address) as other:
                other.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(GraphInterrupted):
            comfy_client.run(graph, progress=lambda p: stepping.set() if p.maximum else None, timeout=120)
    finally:
        stepping.set()
        thread.join()


def test_a_run_that_takes_too_long_is_given_up(comfy_client: Client) -> None:
    with pytest.raises(TimeoutError):
        comfy_client.run(stock_graph(0x445566), timeout=-1)


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ServerGoneError, match="no ComfyUI answers"):
        Client(f"127.0.0.1:{free_port()}").__enter__()


def test_help_page_and_template_are_served(comfy_server) -> None:
    for path in ("/extensions/semantic-style/docs/SemanticStyleReplay.md", "/workflow_templates"):
        with urllib.request.urlopen(f"http://{comfy_server.address}{path}", timeout=10) as answer:
            assert answer.status == 200
