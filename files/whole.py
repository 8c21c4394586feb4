"""Files that are there whole or not at all."""

import os
import time
from collections.abc import Callable
from pathlib import Path

# Windows replaces no file that somebody has open, and a virus scanner opens every new one for a moment.
WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, and put it there when it is complete.

    A full disk or a cancelled run leaves what was there before.

    Raises:
        OSError: also a file that is there and that another program keeps open (on Windows).
    """
    # Hidden and a name of its own: no list shows it, and a second ComfyUI may write the same.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(unfinished)
        for wait in WAITS:
            try:
                os.replace(unfinished, path)
                return
            except PermissionError:
                time.sleep(wait)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
