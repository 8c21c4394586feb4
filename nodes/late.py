"""What comes after a long run (plots, reports, files) may fail; the run's result is not lost with it."""

import logging
from collections.abc import Callable
from typing import TypeVar

import comfy.model_management

T = TypeVar("T")


def attempt(what: str, make: Callable[[], T], instead: T) -> tuple[T, str]:
    """`make()` and "", or `instead` and a sentence on why not, which is logged as well. Cancel goes through."""
    try:
        return make(), ""
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:
        note = f"{what} failed ({type(error).__name__}: {error}); the rest of the result is complete."
        logging.warning("Semantic Style: %s", note, exc_info=True)
        return instead, note
