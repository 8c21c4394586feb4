"""Several ComfyUI of one machine, started for a batch: one for each GPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import launch, locate

ROOT = Path(__file__).absolute().parent.parent
MODELS_NAME = "host"


class FarmError(RuntimeError):
    """No ComfyUI can be started here."""


@contextlib.contextmanager
def servers(count: int, logs: Path) -> Iterator[list[str]]:
    """The addresses of `count` ComfyUI with the pack, on a GPU each if there is more than one; logs go into `logs`.

    They see the models of the ComfyUI that is found, and write into folders of their own, which vanish with them.
    Raises `FarmError`, and `launch.ServerError` when one does not start.
    """
    if not count:
        yield []
        return
    host = locate.find_host(ROOT)
    if host is None:
        raise FarmError(f"--start needs ComfyUI: {locate.NO_HOST}")
    accelerated = "--cpu" not in launch.device_arguments()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(count) as threads:
        models = stack.enter_context(model_paths(host))
        logs.mkdir(parents=True, exist_ok=True)

        def start(number: int) -> str:
            choice = ["--cuda-device", str(number)] if accelerated and count > 1 else []
            log = logs / f"comfyui_{number}.log"
            server = launch.comfy_server(host, ROOT, log=log, arguments=[*choice, *models])
            return stack.enter_context(server).address

        yield list(threads.map(start, range(count)))


@contextlib.contextmanager
def model_paths(host: Path) -> Iterator[list[str]]:
    """ComfyUI's option that has another one use the models of the ComfyUI in folder `host`."""
    import tempfile

    folders = sorted(folder.name for folder in (host / "models").glob("*/"))
    # JSON is YAML; ComfyUI's own reader wants the latter.
    paths = {MODELS_NAME: {"base_path": str(host / "models"), **{name: name for name in folders}}}
    with tempfile.TemporaryDirectory(prefix="semantic-style-models-") as folder:
        file = Path(folder) / "paths.yaml"
        file.write_text(json.dumps(paths), encoding="utf-8")
        yield ["--extra-model-paths-config", str(file)] if folders else []
