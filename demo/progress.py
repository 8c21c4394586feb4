"""A progress bar for a terminal, and plain lines where the output is no terminal."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

BAR_WIDTH = 28
REDRAW_SECONDS = 0.05


class ProgressBar:
    """One line that fills up while a piece of work goes on; use it in a `with` block."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title = title
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.started = time.monotonic()
        self.drawn = 0.0

    def __enter__(self) -> ProgressBar:
        if self.live:
            self.update(0.0)
        return self

    def update(self, fraction: float, note: str = "") -> None:
        """Show `fraction` (0 to 1) of the work as done, and what is going on in words."""
        now = time.monotonic()
        if not self.live or now - self.drawn < REDRAW_SECONDS:
            return
        self.drawn = now
        filled = round(BAR_WIDTH * fraction)
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        line = f"{self.title} [{bar}] {fraction:4.0%} {note}"
        # A line that wraps could not be overwritten.
        self.stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        self.stream.flush()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
        if kind is None:
            self.stream.write(f"{self.title}: {time.monotonic() - self.started:.1f} s\n")
        self.stream.flush()
