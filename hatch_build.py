"""How does the part in C, which torchguard can do without, get into the package?

Run by hatchling when the package is built or installed from a clone: it compiles ``torchguard/_native.c`` beside its
source. Where there is no compiler, or no header of Python, that is said, and the package is built without.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[Any]):
    """Compiles for a wheel, and in place for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and have the wheel carry the tag of this machine if that went well."""
        if self.target_name != "wheel" or os.environ.get("TORCHGUARD_NATIVE") == "0":
            return
        built = compile_native(Path(self.root))
        if built is not None:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["force_include"][str(built)] = f"torchguard/{built.name}"


def compile_native(root: Path) -> Path | None:
    """Compile beside the source; None, and a line that says why, where that does not work."""
    from setuptools import Distribution, Extension

    extension = Extension("torchguard._native", [str(root / "torchguard" / "_native.c")])
    distribution = Distribution({"name": "torchguard-autograd", "packages": ["torchguard"], "ext_modules": [extension]})
    distribution.package_dir = {"torchguard": str(root / "torchguard")}
    command: Any = distribution.get_command_obj("build_ext")
    command.inplace = True
    with tempfile.TemporaryDirectory() as temporary:
        command.build_temp = command.build_lib = temporary
        command.ensure_finalized()
        try:
            command.run()
        except Exception as error:  # of the compiler, of distutils, of a read-only folder
            print(f"torchguard is built without its part in C: {error}", file=sys.stderr)
            return None
    return root / "torchguard" / Path(command.get_ext_fullpath("torchguard._native")).name
