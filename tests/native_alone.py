"""Does the part in C run on this Python? Compiled here, without torch, on plain objects in the place of tensors.

``python3.12 tests/native_alone.py`` asks another Python than the one that the tests run on; ``-X dev`` has it look at what
it is doing. It needs a C compiler and that Python's headers.
"""

from __future__ import annotations

import collections
import gc
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent.parent / "torchguard" / "_native.c"
ROUNDS = 20_000


def compiled(directory: str) -> Any:
    """The module, as a compiler that is told to take warnings for errors makes it."""
    library = os.path.join(directory, "_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    include = sysconfig.get_path("include")
    flags = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{include}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, str(SOURCE), "-o", library], check=True)
    specification = importlib.util.spec_from_file_location("_native", library)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Node:
    """What has made a tensor."""

    def _sequence_nr(self) -> int:
        return 4


class Tensor:
    """What the part in C asks of a tensor."""

    is_nested = False
    output_nr = 0
    _base = None

    def __init__(self, grad_fn: Node | None = None) -> None:
        self.grad_fn = grad_fn
        self._version = 0

    def detach(self) -> Tensor:
        return Tensor()

    def _is_view(self) -> bool:
        return False


class Parameter(Tensor):
    """Another plain type."""


class Other:
    """A type that is asked for, and met nowhere."""


def main() -> None:
    """Record and read tensors many times over; what is out of the ordinary must come to the functions in Python."""
    with tempfile.TemporaryDirectory() as directory:
        native = compiled(directory)

    class Save(native.Fields):  # type: ignore[misc]
        __slots__ = ()

    class Shared:
        exports: tuple[()] = ()

    pending: collections.deque[Any] = collections.deque()
    pack = native.Pack(
        otherwise=lambda tensor: "python",
        save_type=Save,
        tensor_type=Tensor,
        parameter_type=Parameter,
        mode_active=lambda: False,
        storage_id=lambda tensor: 1,
        next_number=lambda: 5,
        output_after_all=lambda save, grad_fn, number: False,
        is_open=lambda tensor: False,
        mend_foreach=lambda node, number, code: None,
        keep_small_proof=lambda save: None,
        inside_library={__file__: False, "library": True},
        own_files=frozenset(),
        apply_code=None,
        generic_node=Other,
        view_node=Other,
        own_nodes={Node},
        saves_no_output=set(),
        young={},
        aliases={},
        exports={1: Shared()},
        dead_exports=collections.deque(),
        recording={},
        pending=pending,
        append=pending.append,
        file=pending.clear,
        file_at=100,
        fresh=2,
        first=0,
    )
    unpack = native.Unpack(
        otherwise=lambda save: "python",
        collecting=[],
        tensor_type=Tensor,
        mode_active=lambda: False,
        storage_id=lambda tensor: 1,
        records=lambda: False,
        young={},
        aliases={},
    )
    library: dict[str, Any] = {}
    exec(compile("def call(hook, tensor):\n    return hook(tensor)\n", "library", "exec"), library)
    for _ in range(ROUNDS):
        tensor = Parameter()
        save = pack(tensor)
        assert (save.tensor, save.node, save.version, save.storage) == (tensor, None, 0, 1)
        assert save.code is save.inner_code is main.__code__
        assert unpack(save) is tensor
        output = Tensor(Node())
        save = library["call"](pack, output)
        assert (save.node, save.inner_code.co_filename, save.code) == (Node, "library", main.__code__)
        assert save.tensor is not output
        tensor._version = 3
        assert unpack(pack(tensor)) is tensor
        save = pack(tensor)
        tensor._version = 4
        assert unpack(save) == pack("no tensor") == "python"
    hold = weakref.ref(tensor)
    del tensor, save
    gc.collect()
    assert hold() is None
    print(f"Python {sys.version.split()[0]}: {ROUNDS} rounds of the part in C")


if __name__ == "__main__":
    main()
