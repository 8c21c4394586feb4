"""The time that is left of a run, as a line of text under the node that runs.

The host draws progress bars and previews by itself; this adds what they do not say.
"""

import sys
import time
from collections.abc import Callable

from torch import Tensor

# Seconds between two lines: more often nobody reads them, and every line is a message to the browser.
EVERY = 0.5


def show(text: str) -> None:
    """Under the node that the user sees at work (of an expanded node that node itself); nothing where nobody looks."""
    # A host without its server, as in tests and benchmarks, has not imported it, and could not everywhere.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and server.client_id is not None and server.last_node_id is not None:
        server.send_progress_text(text, server.last_node_id, server.client_id)


class TimeLeft:
    """Estimates, from the clock alone, how long a run goes on: a device is never waited for.

    The first steps that are reported say what the rest costs only where there are no others: they load the model, and
    fill caches.

    Args:
        show, clock: where lines go, and seconds; other ones for tests.
    """

    def __init__(self, show: Callable[[str], None] = show, clock: Callable[[], float] = time.monotonic) -> None:
        self.show, self.clock = show, clock
        self.begun = self.shown = clock()
        self.first: tuple[int, float] | None = None

    def update(self, done: int, total: int) -> None:
        """After so many steps of the run."""
        now = self.clock()
        since, start = self.first or (0, self.begun)
        self.first = self.first or (done, now)
        last = done >= total
        if done <= since or (now - self.shown < EVERY and not last):
            return
        self.shown = now
        if last:
            self.show(f"{total} steps in {as_time(now - self.begun)}")
        else:
            left = (now - start) / (done - since) * (total - done)
            self.show(f"step {done} of {total}, {as_time(left)} left")


def with_time_left(callback: Callable[..., None]) -> Callable[..., None]:
    """A callback of the host's samplers that says the time left as well."""
    left = TimeLeft()

    def report(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        left.update(step + 1, total)
        callback(step, denoised, x, total)

    return report


def as_time(seconds: float) -> str:
    """ "7 s", "2:05", "1:00:09"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
