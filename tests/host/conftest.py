"""ComfyUI for the host tests: in this process, and as one server for the whole session."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from semantic_style.runner import locate

ROOT = Path(__file__).resolve().parents[2]


def _bring_in_host(folder: Path, base: Path) -> None:
    """Make ComfyUI importable and set its command line before anything reads it."""
    import torch

    sys.path.insert(0, str(folder))
    # What tests share (newer_hosts), behind all that ComfyUI calls its own.
    sys.path.append(str(Path(__file__).parent))
    import comfy.cli_args

    arguments = comfy.cli_args.args
    arguments.cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    arguments.use_pytorch_cross_attention = True
    # Models, outputs and temporary files of a test must not land in somebody's ComfyUI.
    arguments.base_directory = str(base)


def pytest_configure(config: pytest.Config) -> None:
    folder = locate.find_host(ROOT)
    if folder is None:
        raise pytest.UsageError(f"{locate.NO_HOST}: `make setup` brings one")
    base = tempfile.TemporaryDirectory(prefix="semantic-style-tests-")
    config.add_cleanup(base.cleanup)
    _bring_in_host(folder, Path(base.name))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """More threads than idle cores make small layers many times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def as_the_host_runs_nodes() -> Iterator[None]:
    """In inference mode."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def comfy_server(host_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """One running ComfyUI with the pack in it, as a `semantic_style.runner.launch.Server`."""
    from semantic_style.runner.launch import comfy_server

    log = tmp_path_factory.mktemp("server") / "comfyui.log"
    with comfy_server(host_folder, ROOT, log=log) as server:
        yield server


@pytest.fixture
def comfy_client(comfy_server) -> Iterator:
    """A `semantic_style.runner.client.Client` connected to `comfy_server`."""
    from semantic_style.runner.client import Client

    with Client(comfy_server.address) as client:
        yield client
