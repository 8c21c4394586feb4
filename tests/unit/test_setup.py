"""tools/setup.py: where ComfyUI is looked for, and what is done once and what again."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from semantic_style.runner import locate


def make_host(folder: Path) -> Path:
    for name in ("comfy", "comfy_api", "custom_nodes"):
        (folder / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (folder / name).write_text("")
    (folder / "requirements.txt").write_text("torch\n# a comment\naiohttp>=3.11.8  # why\n\n")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without ComfyUI."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("COMFYUI_PATH", "SEMANTIC_STYLE_NO_HOST", "SEMANTIC_STYLE_VENV", "PWD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    return folder


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    return folder


@pytest.fixture
def setup(home: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup.py as a module, with every act that costs time or network replaced by an entry in `setup.done`."""
    monkeypatch.syspath_prepend(root / "tools")
    spec = importlib.util.spec_from_file_location("setup_script", root / "tools" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.done = []

    def make_venv(venv: Path) -> None:
        module.done.append("venv")
        venv.mkdir(exist_ok=True)

    def install_host(*arguments: object) -> str:
        module.done.append("host")
        return "github.com cannot be reached"

    monkeypatch.setattr(module, "make_venv", make_venv)
    monkeypatch.setattr(module, "install_host", install_host)
    monkeypatch.setattr(module, "pip_install", lambda python, *what: module.done.append(" ".join(what)))
    monkeypatch.setattr(module, "works", lambda python: Path(python).parents[1].is_dir())
    return module


def test_no_comfyui_is_none(home: Path, pack: Path) -> None:
    assert locate.find_host(pack) is None
    assert locate.why_no_host() == locate.NO_HOST


def test_comfyui_path_comes_first(home: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_host(home / "comfy" / "ComfyUI")
    named = make_host(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert locate.find_host(pack) == named


def test_a_wrong_comfyui_path_is_passed_over(home: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = make_host(home / "comfy" / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", str(home / "nowhere"))
    assert locate.find_host(pack) == default


def test_the_comfyui_around_the_pack_comes_before_the_default(home: Path, tmp_path: Path) -> None:
    make_host(home / "comfy" / "ComfyUI")
    around = make_host(tmp_path / "around")
    pack = around / "custom_nodes" / "semantic-style"
    pack.mkdir()
    assert locate.find_host(pack) == around


def test_a_pack_linked_into_custom_nodes_finds_it_by_the_link(
    home: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = make_host(tmp_path / "around")
    link = around / "custom_nodes" / "semantic-style"
    link.symlink_to(pack)
    assert locate.find_host(link) == around
    # `make` in the linked folder: the process sees the real folder, only the shell's variable names the link.
    monkeypatch.setenv("PWD", str(link))
    assert locate.find_host(pack) == around


def test_a_shell_somewhere_else_does_not_count(
    home: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = make_host(tmp_path / "around") / "custom_nodes" / "another-pack"
    elsewhere.mkdir()
    monkeypatch.setenv("PWD", str(elsewhere))
    assert locate.find_host(pack) is None


def test_a_folder_without_v3_api_is_no_host(home: Path, pack: Path) -> None:
    default = make_host(home / "comfy" / "ComfyUI")
    (default / "comfy_api").rmdir()
    assert locate.find_host(pack) is None


def test_the_search_can_be_switched_off(home: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_host(home / "comfy" / "ComfyUI")
    monkeypatch.setenv("SEMANTIC_STYLE_NO_HOST", "1")
    assert locate.find_host(pack) is None
    assert locate.why_no_host() == locate.SWITCHED_OFF


def test_requirements_are_read_as_toml_reads_them(setup: ModuleType, root: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    assert set(setup.declared(text)) == {*project["dependencies"], *extras["demo"], *extras["test"]}


def test_a_second_call_does_nothing(setup: ModuleType, tmp_path: Path) -> None:
    host = make_host(tmp_path / "host")
    setup.set_up(tmp_path / "venv", host, retry_host=False)
    assert setup.done[0] == "venv"
    assert "aiohttp>=3.11.8" in setup.done[1].split()
    assert "einops" in setup.done[1].split()
    setup.done.clear()
    setup.set_up(tmp_path / "venv", host, retry_host=False)
    # An environment that serves ComfyUI serves the pack alone as well.
    setup.locate.switched_off = lambda: True
    setup.set_up(tmp_path / "venv", None, retry_host=False)
    assert setup.done == []


def test_a_comfyui_that_was_away_for_a_while_needs_no_new_set_up(setup: ModuleType, tmp_path: Path) -> None:
    host = make_host(tmp_path / "host")
    setup.set_up(tmp_path / "venv", host, retry_host=False)
    setup.set_up(tmp_path / "venv", None, retry_host=False)
    setup.done.clear()
    setup.set_up(tmp_path / "venv", host, retry_host=False)
    assert setup.done == []


@pytest.mark.parametrize("change", ["requirements", "another host", "broken environment"])
def test_a_change_sets_up_again(setup: ModuleType, tmp_path: Path, change: str) -> None:
    host = make_host(tmp_path / "host")
    setup.set_up(tmp_path / "venv", host, retry_host=False)
    setup.done.clear()
    if change == "requirements":
        (host / "requirements.txt").write_text("torch\nnew-thing\n")
    elif change == "another host":
        host = make_host(tmp_path / "host2")
    else:
        setup.works = lambda python: False
    setup.set_up(tmp_path / "venv", host, retry_host=False)
    assert setup.done


def test_a_failed_host_is_tried_again_only_when_asked(
    setup: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    setup.set_up(tmp_path / "venv", None, retry_host=False)
    assert setup.done[:2] == ["venv", "host"]
    assert "going on without ComfyUI" in capsys.readouterr().out
    setup.done.clear()
    setup.set_up(tmp_path / "venv", None, retry_host=False)
    assert setup.done == []
    assert "github.com cannot be reached" in capsys.readouterr().out
    setup.set_up(tmp_path / "venv", None, retry_host=True)
    assert "host" in setup.done


def test_an_interrupted_set_up_is_done_again(setup: ModuleType, tmp_path: Path) -> None:
    host = make_host(tmp_path / "host")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    install, setup.pip_install = setup.pip_install, interrupted
    with pytest.raises(KeyboardInterrupt):
        setup.set_up(tmp_path / "venv", host, retry_host=False)
    setup.done.clear()
    setup.pip_install = install
    setup.set_up(tmp_path / "venv", host, retry_host=False)
    assert len(setup.done) == 2


def test_somebody_elses_environment_is_checked_and_never_changed(setup: ModuleType, tmp_path: Path) -> None:
    venv = tmp_path / "theirs"
    (venv / "bin").mkdir(parents=True)
    setup.python_of = lambda venv: Path(sys.executable)
    setup.works = lambda python: True
    assert setup.is_foreign(venv)
    setup.check_foreign(venv, None)
    host = make_host(tmp_path / "host")
    (host / "requirements.txt").write_text("no-such-distribution-anywhere>=1\n")
    with pytest.raises(setup.SetupError, match="lacks no-such-distribution-anywhere"):
        setup.check_foreign(venv, host)
    assert setup.done == []
    assert not (venv / setup.STAMP).exists()


def test_a_command_that_hangs_is_ended(setup: ModuleType) -> None:
    import comfy_install

    started = time.monotonic()
    # The grandchild keeps the pipe open: only the end of the whole group ends the wait.
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    status, output = comfy_install.run_limited([sys.executable, "-c", script], 0.5)
    assert (status, output) == (None, "no end after 0.5 s")
    assert time.monotonic() - started < 20


def test_the_user_s_comfy_cli_settings_stay_out_of_it(setup: ModuleType, tmp_path: Path, home: Path) -> None:
    import comfy_install

    (home / ".gitconfig").write_text("")
    environment = comfy_install.comfy_cli_environment(tmp_path / "venv", tmp_path / "elsewhere")
    assert environment["HOME"] == str(tmp_path / "elsewhere")
    assert environment["GIT_CONFIG_GLOBAL"] == str(home / ".gitconfig")
    assert environment["VIRTUAL_ENV"] == str(tmp_path / "venv")
