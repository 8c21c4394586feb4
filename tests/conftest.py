"""What every test gets: the pack as `semantic_style`, and an honest word about tests that did not run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # The processors divided among the processes, also among the servers that they start; PyTorch reads it once.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

ROOT = Path(__file__).resolve().parent.parent
HOST_TESTS = ROOT / "tests" / "host"
# What a machine may lack without a fault of ours, by the first words of the reason.
ALLOWED_SKIPS = ("no peer packs", "no shared data", "no GPU", "this ComfyUI has no", "Ray is not installed")

# ComfyUI owns the module name `nodes`; with the pack's root on the path the pack's folder of that name would win.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def _load_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        "semantic_style", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules["semantic_style"] = pack
    spec.loader.exec_module(pack)


_load_pack()

from semantic_style.runner import locate  # noqa: E402


@pytest.fixture(scope="session")
def root() -> Path:
    """The pack's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """Import a file of tools/ by its name; the files there import each other by theirs."""

    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(ROOT / "tools"))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(ROOT / "tools"))

    return load


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden data and photos beside the checkout; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}")
    return folder


@pytest.fixture(scope="session")
def host_folder() -> Path:
    """ComfyUI's folder."""
    folder = locate.find_host(ROOT)
    assert folder is not None
    return folder


@pytest.fixture
def without_float64() -> Iterator:
    """A `torch.device` that refuses float64, as Apple's does; tensors there hold theirs on the CPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    # A device that every build of PyTorch knows and that has no kernels of its own to be missing.
    device = torch.device("meta")

    class There(torch.Tensor):
        held: torch.Tensor

        @staticmethod
        def __new__(cls, held: torch.Tensor) -> There:
            like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
            there = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=device, **like)
            there.held = held
            return there

        def tolist(self) -> list:
            return self.held.tolist()

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return on_the_cpu(func, args, kwargs or {})

    def on_the_cpu(func, args, kwargs):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, There)]
        asked = kwargs.get("device")
        stays = bool(given) if asked is None else torch.device(asked) == device
        moved = kwargs if asked is None else {**kwargs, "device": "cpu"}
        args, moved = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, moved))
        out = func(*args, **moved)
        return tree_map(lambda x: there(x, given) if isinstance(x, torch.Tensor) else x, out) if stays else out

    def there(x: torch.Tensor, given: list) -> torch.Tensor:
        if x.dtype == torch.float64:
            raise TypeError("Cannot convert a tensor to float64: this device does not support it")
        # What an operation in place gives back is what it was given.
        same = [one for one in given if one.held is x]
        # A view of an ordinary tensor is one, in inference mode too.
        with torch.inference_mode(all(one.is_inference() for one in given) and torch.is_inference_mode_enabled()):
            return same[0] if same else There(x)

    class Device(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if torch.is_inference_mode_enabled():
                with self:
                    parts = func.decompose(*args, **(kwargs or {}))
                if parts is not NotImplemented:
                    return parts
            return on_the_cpu(func, args, kwargs or {})

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Device():
        yield device
    torch.__future__.set_overwrite_module_params_on_conversion(before)


class SkipReport:
    """Under CI=true a run in which a test was skipped for a reason that is not allowed, or no host test ran, fails.

    It says so last, after pytest's own summary. Where several processes share the tests, each tells the first one.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.terminal = config.pluginmanager.get_plugin("terminalreporter")
        self.under_ci = os.environ.get("CI", "").lower() in ("true", "1")
        self.faults: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if item.path.is_relative_to(HOST_TESTS):
                item.add_marker(pytest.mark.host)
            # Whole graphs on a server: most of the suite's time.
            if {"comfy_server", "frontend"} & set(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.slow)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        whole_run = any(HOST_TESTS.is_relative_to(_path_of(argument)) for argument in session.config.args)
        if whole_run and not any(item.get_closest_marker("host") for item in session.items):
            self.faults.append("none were collected below tests/host")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look_at(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look_at(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        told = getattr(node, "workeroutput", {}).get("faults", [])
        self.faults += [fault for fault in told if fault not in self.faults]

    def _look_at(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            assert isinstance(report.longrepr, tuple)
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not reason.startswith(ALLOWED_SKIPS):
                fault = f"{report.nodeid} was skipped: {reason}"
                self.faults += [fault] if fault not in self.faults else []

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["faults"] = self.faults
            return
        passed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self.faults and self.under_ci and passed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        if self.faults and self.under_ci and self.terminal is not None:
            for fault in self.faults:
                self.terminal.write_line(f"CI=true, the run fails: {fault}")


def _path_of(argument: str) -> Path:
    return Path(argument.partition("::")[0]).absolute()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipReport(config), "skip-report")
