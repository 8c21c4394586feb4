"""Run the `main` of a module of the pack: python tools/run.py demo.run [ARGUMENTS]; `batch` is runner.batch.

The pack's root must stay away from sys.path (its `nodes` would hide ComfyUI's), so `python -m` is no way to start
these modules, whose imports are relative.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
PACKAGE = "semantic_style"
SHORT = {"batch": "runner.batch"}


def load_pack() -> None:
    """Import the folder this file lies in as `semantic_style`, whatever the folder is called."""
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT / '__init__.py'} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python tools/run.py MODULE [ARGUMENTS], for example: python tools/run.py demo.run")
    module = SHORT.get(sys.argv[1], sys.argv[1])
    del sys.argv[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT.resolve()]
    load_pack()
    sys.exit(importlib.import_module(f"{PACKAGE}.{module}").main())


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a process that a program of the pack starts
    load_pack()
