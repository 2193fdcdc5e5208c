"""Packages that only some parts need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def needed(module: str, what: str, extra: str, package: str | None = None) -> Any:
    """Return a module, or say that `what` needs its package and which extra of simworld installs it.

    Raises:
        ImportError: the package is not there, or does not load for want of a library of the system.
    """
    package = package or module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}; install it with: pip install 'simworld[{extra}]'") from error
    except OSError as error:
        raise ImportError(f"{what} needs {package}, which does not load ({error}); install what it misses.") from error
