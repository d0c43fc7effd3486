"""Does the environment ask for torchguard? torch asks here, at the end of every ``import torch``.

A module of its own beside the package, so that ``import torch`` touches nothing of the package until the answer is yes,
not even where another project's ``torchguard`` was installed over it. It must never raise: ``import torch`` would.
(PYTEST_DONT_REWRITE: torch may be imported before pytest is.)
"""

import os


def start() -> None:
    """Switch the guard on if the variable ``TORCHGUARD`` says so."""
    if not os.environ.get("TORCHGUARD"):
        return
    try:
        from torchguard._switch import at_import_of_torch

        at_import_of_torch()
    except Exception as error:
        import sys

        try:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            sys.stderr.write(f"torchguard: could not be switched on: {what}\n")
        except Exception:
            return  # no standard error to tell it on
