"""What every test gets: the pack as `semantic_style`, and an honest word about host tests that did not run."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST_TESTS = ROOT / "tests" / "host"
NO_HOST = "no host: "

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
def shared() -> Path:
    """The folder of golden data and photos beside the checkout; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}")
    return folder


@pytest.fixture(scope="session")
def host_folder() -> Path:
    """ComfyUI's folder; only tests below tests/host may ask for it (they are skipped where there is none)."""
    folder = locate.find_host(ROOT)
    if folder is None:
        pytest.skip(NO_HOST + locate.why_no_host())
    return folder


class HostTestReport:
    """Says last, after pytest's own summary, when host tests did not run; under CI=true that fails the run."""

    def __init__(self, config: pytest.Config) -> None:
        self.terminal = config.pluginmanager.get_plugin("terminalreporter")
        self.under_ci = os.environ.get("CI", "").lower() in ("true", "1")
        self.reason: str | None = None
        self.collected = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        host_items = [item for item in items if item.path.is_relative_to(HOST_TESTS)]
        self.collected = len(host_items)
        without_host = locate.find_host(ROOT) is None
        for item in host_items:
            item.add_marker(pytest.mark.host)
            if without_host:
                item.add_marker(pytest.mark.skip(reason=NO_HOST + locate.why_no_host()))
        if host_items and without_host:
            self.reason = locate.why_no_host()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        whole_run = any(HOST_TESTS.is_relative_to(_path_of(argument)) for argument in session.config.args)
        if whole_run and not self.collected:
            self.reason = "none were collected below tests/host"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        passed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self.reason and self.under_ci and passed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        if self.reason and self.terminal is not None:
            verdict = " (CI=true: the run fails)" if self.under_ci else ""
            self.terminal.write_line(f"HOST TESTS SKIPPED: {self.reason}{verdict}")


def _path_of(argument: str) -> Path:
    return Path(argument.partition("::")[0]).absolute()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(HostTestReport(config), "host-test-report")
