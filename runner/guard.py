"""Run a script until it ends or its starter is gone: python guard.py SCRIPT [ARGUMENTS], started with a pipe as stdin.

The system closes the pipe's other end with the process that holds it, however that process dies, so a server started
this way outlives nobody, not even a starter that was killed. Standard library only; not part of the package.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading


def end_with_starter() -> None:
    # os.read and not sys.stdin: a thread that waits inside a buffered file blocks the interpreter's shutdown.
    while os.read(0, 1):
        pass
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    else:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(os.getpid())], capture_output=True)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_starter, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
