"""Run mypy on the pack under its name `semantic_style`, whatever the checkout's folder is called."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    *("attention", "benchmarks", "demo", "files", "host", "nodes", "paperland", "pictures", "regions", "runner"),
    "samplers",
)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        # mypy names modules by the folders around them; "semantic-style" or "main" would do no good.
        (Path(folder) / "semantic_style").symlink_to(ROOT, target_is_directory=True)
        packages = [f"--package=semantic_style.{part}" for part in PARTS if (ROOT / part / "__init__.py").is_file()]
        # No cache: it would remember files by the temporary folder's name, and take missing ones to be still missing.
        options = [f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={os.devnull}"]
        scripts = [
            str(Path(folder) / "semantic_style" / "tools" / name) for name in ("setup.py", "host_install.py", "run.py")
        ]
        runs = [[*options, *packages], [*options, *scripts]]
        return max(subprocess.run([sys.executable, "-m", "mypy", *run], cwd=folder).returncode for run in runs)


if __name__ == "__main__":
    sys.exit(main())
