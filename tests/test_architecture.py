"""Does each module import only what its room may know, and is torch's private side touched in one place?"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torchguard

PACKAGE = Path(torchguard.__file__).parent

#: Which module may import which of ours. An arrow that is not here is a decision to be taken; one that no
#: module uses any more is to be taken out.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"_switch", "_violation", "guard"},
    "__main__": {"_config", "_fast", "_suppressions", "_switch", "_tracebacks"},
    "_aliases": {"_counts", "_ledger", "_memory", "_model", "_overlap", "_places", "_saves", "_torch"},
    "_audit": {"_memory", "_places", "_policy", "_saves", "_torch", "_verdict", "_violation"},
    "_collectives": {
        "_aliases", "_counts", "_memory", "_places", "_policy", "_rehearsal", "_saves", "_torch", "_violation",
        "_writers", "_writes",
    },
    "_compiled": {
        "_aliases", "_memory", "_packing", "_places", "_policy", "_reads", "_saves", "_torch", "_violation",
        "_writers", "_writes",
    },
    "_arrays": {"_torch"},
    "_config": set(),
    "_counterless": set(),
    "_counts": set(),
    "_demo": set(),
    "_explain": {
        "_memory", "_model", "_patching", "_places", "_policy", "_saves", "_torch", "_traces", "_violation",
        "_writers",
    },
    "_exports": {"_counts", "_fast", "_memory", "_model", "_overlap", "_places", "_saves", "_torch"},
    "_fast": set(),
    "_findings": {"_torch", "_violation"},
    "_fingerprint": {"_memory", "_torch"},
    "_functorch": {"_aliases", "_memory", "_packing", "_policy", "_reads", "_saves", "_torch"},
    "_hooked": {
        "_aliases", "_exports", "_inputs", "_memory", "_overlap", "_packing", "_places", "_policy", "_reads",
        "_rereads", "_saves", "_torch", "_verdict", "_violation",
    },
    "_hooks": {"_functorch", "_hooked", "_memory", "_packing", "_patching", "_policy", "_reads", "_torch"},
    "_inputs": {"_memory", "_torch"},
    "_intercept": {
        "_aliases", "_collectives", "_compiled", "_exports", "_fast", "_hooked", "_hooks", "_inputs", "_interchange",
        "_memory", "_patching", "_places", "_policy", "_pools", "_preserved", "_reads", "_recompute", "_refusal",
        "_rereads", "_saves", "_selfwrites", "_stashes", "_storages", "_torch", "_watch", "_writers", "_writes",
    },
    "_interchange": {
        "_arrays", "_exports", "_memory", "_model", "_places", "_policy", "_rereads", "_saves", "_torch", "_writes",
    },
    "_ledger": set(),
    "_memory": {"_counts", "_model", "_torch"},
    "_model": set(),
    "_overlap": {"_model"},
    "_packing": {"_aliases", "_exports", "_fast", "_inputs", "_memory", "_places", "_policy", "_saves", "_torch"},
    "_patching": {"_fast", "_torch"},
    "_places": {"_model", "_torch"},
    "_policy": {"_violation"},
    "_pools": {"_hooks", "_policy"},
    "_preserved": {"_aliases", "_memory", "_places", "_saves", "_torch", "_writes"},
    "_progress": {"guard"},
    "_reads": {
        "_aliases", "_audit", "_counts", "_exports", "_fast", "_inputs", "_memory", "_places", "_policy", "_refusal",
        "_rereads", "_saves", "_torch", "_verdict", "_violation",
    },
    "_recompute": {
        "_arrays", "_memory", "_places", "_policy", "_replay", "_rereads", "_torch", "_verdict", "_violation",
        "_writers",
    },
    "_refusal": {"_torch"},
    "_rehearsal": {"_memory", "_torch", "_writers"},
    "_replay": {"_arrays", "_counts", "_memory", "_packing", "_reads", "_rereads", "_torch", "_writers"},
    "_report": {"_report._merging", "_report._records", "_report._writer"},
    "_report._files": {"_config", "_report._page", "_report._records", "_report._sarif"},
    "_report._highlight": set(),
    "_report._merging": {"_report._files", "_report._records"},
    "_report._page": {"_report._highlight", "_report._records"},
    "_report._records": {"_model", "_violation"},
    "_report._sarif": {"_report._records"},
    "_report._source": set(),
    "_report._writer": {"_report._files", "_report._records", "_report._source", "_violation"},
    "_rereads": {"_aliases", "_arrays", "_exports", "_memory", "_places", "_policy", "_saves", "_torch"},
    "_saves": {
        "_counts", "_fast", "_fingerprint", "_ledger", "_memory", "_model", "_places", "_policy", "_torch", "_violation",
    },
    "_selfwrites": {
        "_aliases", "_memory", "_model", "_overlap", "_places", "_policy", "_rereads", "_saves", "_torch", "_writers",
    },
    "_stashes": {"_memory", "_places", "_policy", "_reads", "_saves", "_torch"},
    "_stats": {"_counts", "_saves", "_torch"},
    "_storages": {"_memory", "_places", "_saves", "_torch", "_writers", "_writes"},
    "_suppressions": {"_violation"},
    "_switch": {"_config", "_findings", "_policy", "_progress", "_report", "_suppressions", "_violation", "guard"},
    "_torch": set(),
    "_tracebacks": {"_violation"},
    "_traces": {"_memory", "_places", "_torch"},
    "_verdict": {"_memory", "_places", "_policy", "_saves", "_torch", "_violation"},
    "_violation": {"_model"},
    "_watch": {
        "_collectives", "_counterless", "_explain", "_memory", "_patching", "_places", "_policy", "_saves", "_torch",
        "_traces", "_writers", "_writes",
    },
    "_writers": {"_counterless", "_memory", "_torch"},
    "_writes": {
        "_aliases", "_counts", "_memory", "_overlap", "_places", "_policy", "_rehearsal", "_rereads", "_saves",
        "_selfwrites", "_torch", "_verdict", "_violation", "_writers",
    },
    "guard": {
        "_config", "_findings", "_hooks", "_intercept", "_policy", "_reads", "_stats", "_suppressions", "_violation",
        "_watch",
    },
    "integrations": set(),
    "integrations._callback": {"_config", "_findings", "_violation", "guard"},
    "integrations.lightning": {"integrations._callback"},
    "integrations.transformers": {"integrations._callback"},
    "pytest_plugin": {"_config", "_model", "_report", "_suppressions", "_switch", "_tracebacks", "_violation", "guard"},
}  # fmt: skip

#: These know plain values only: they are tested without a tensor.
WITHOUT_TORCH = {
    "__init__", "__main__", "_config", "_counts", "_demo", "_fast", "_findings", "_ledger", "_model", "_overlap", "_policy",
    "_progress", "_stats", "_suppressions", "_switch", "_tracebacks", "_violation", "guard", "integrations",
    "integrations._callback", "integrations.lightning", "integrations.transformers", "pytest_plugin",
} | {name for name in MAY_IMPORT if name.startswith("_report")}  # fmt: skip

#: What may be imported from outside, beside the standard library.
MAY_IMPORT_WRAPT = {"_intercept", "_patching"}
MAY_IMPORT_PYTEST = {"pytest_plugin"}
MAY_IMPORT_JINJA = {"_report._page"}  # torch brings it

#: Modules by their name inside the package: ``_report._files``; a package inside it is known by its own name.
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
MODULES = sorted(FILES)
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(tree: ast.AST, type_checking: bool = True) -> set[str]:
    """Dotted names of everything that is imported; without those under ``if TYPE_CHECKING`` if so asked."""
    skipped: set[ast.AST] = set()
    if not type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                module = node.module == "torchguard" or inner.removeprefix("torchguard.") in FILES
                found.add(inner if module else node.module)
    return found


def ours(name: str, type_checking: bool = True) -> set[str]:
    return {
        dotted.removeprefix("torchguard.")
        for dotted in imports(TREES[name], type_checking)
        if dotted.startswith("torchguard.")
    }


def test_the_table_has_every_module() -> None:
    assert set(MAY_IMPORT) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_what_it_may_and_no_other(name: str) -> None:
    assert ours(name) - MAY_IMPORT[name] == set(), "an arrow that the table does not have"


@pytest.mark.parametrize("name", MODULES)
def test_the_table_has_no_arrow_that_is_not_used(name: str) -> None:
    assert MAY_IMPORT[name] - ours(name) == set(), "take it out of the table"


def test_there_is_no_cycle() -> None:
    """Nor one of types: a module that needs another's only to name its types is not above it either."""
    arrows = {name: ours(name) for name in MODULES}
    while arrows:
        leaves = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert leaves, f"a cycle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_rooms_that_know_no_torch(name: str) -> None:
    assert not {dotted for dotted in imports(TREES[name]) if dotted.split(".")[0] in ("torch", "numpy")}


def test_the_judge_of_plain_integers_runs_without_torch() -> None:
    """Not even through what it imports."""
    for name in ("_model", "_overlap", "_ledger", "_violation"):
        reached, todo = set(), [name]
        while todo:
            module = todo.pop()
            if module not in reached:
                reached.add(module)
                todo += ours(module, type_checking=False)
        assert reached <= {"_model", "_overlap", "_ledger", "_violation"}


def test_only_the_standard_library_torch_and_wrapt_are_imported() -> None:
    import sys

    for name, tree in TREES.items():
        for dotted in imports(tree):
            root = dotted.split(".")[0]
            if root == "wrapt":
                assert name in MAY_IMPORT_WRAPT
            elif root == "jinja2":
                assert name in MAY_IMPORT_JINJA
            elif root == "pytest":
                assert name in MAY_IMPORT_PYTEST
            else:
                assert root in ("torch", "torchguard") or root in sys.stdlib_module_names, (name, dotted)


# ---- private names -----------------------------------------------------------------------------------------


def is_private(attribute: str) -> bool:
    return attribute.startswith("_") and not attribute.startswith("__")


def chain(node: ast.AST) -> list[str]:
    """``torch._C._nn`` -> ["torch", "_C", "_nn"]; empty where it does not begin with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def private_names_of_torch(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        names = chain(node) if isinstance(node, ast.Attribute) else []
        if names and names[0] == "torch" and any(map(is_private, names[1:])):
            found.append(f"line {node.lineno}: {'.'.join(names)}")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            private = [alias.name for alias in node.names if is_private(alias.name)]
            if private or any(map(is_private, node.module.split("."))):
                found.append(f"line {node.lineno}: from {node.module} import {', '.join(private)}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            target, attribute = (chain(node.args[0]) or [getattr(node.args[0], "id", "")]), node.args[1]
            if target[0] == "torch" and isinstance(attribute, ast.Constant) and is_private(str(attribute.value)):
                found.append(f"line {node.lineno}: {attribute.value} of torch")
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name != "_torch"])
def test_private_names_of_torch_are_in_one_module(name: str) -> None:
    assert private_names_of_torch(TREES[name]) == []


def test_the_search_for_private_names_finds_them() -> None:
    for source in (
        "torch._C._nn",
        "x = torch.jit._builtins.y",
        "from torch._ops import OpOverload",
        "from torch.overrides import _push_mode",
        "getattr(torch, '_C')",
    ):
        assert private_names_of_torch(ast.parse("import torch\n" + source)), source
    assert not private_names_of_torch(ast.parse("torch.nn.functional; torch.__file__; x._version; _torch._C"))
    assert private_names_of_torch(TREES["_torch"])


#: Private by their names only, in every supported torch, and asked at every save: a function around one of them
#: costs half as much again.
IN_LINE = {"_version", "_base", "_is_view", "_sequence_nr"}

#: Names of operators and collectives, which a table tells something of. (That of ``_counterless`` is generated.)
TOLD_IN_TABLES = {
    "_collectives": {"_allgather_base", "_reduce_scatter_base"},
    "_selfwrites": {"_foreach_add_", "_foreach_copy_", "_foreach_sub_"},
    "_writers": {"_coalesced_", "_fill_mem_eff_dropout_mask_", "_resize_output_"},
}

#: Those of the module ``sys``.
OF_SYS = {"_current_frames", "_getframe", "_is_gil_enabled"}

#: Other private names of the standard library.
NOT_OF_TORCH = {
    "__main__": {"_run_module_as_main"},
    "_hooks": {"_target"},
    "_pools": {"_WorkItem", "_map_async"},
    "_switch": {"_exit", "_initializing"},
}


def names_given(tree: ast.AST) -> set[str]:
    """What a module defines, and the attributes that it gives to its own objects and to others."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Assign) and any(map(is_slots, node.targets)):
            found |= {constant.value for constant in ast.walk(node.value) if is_text(constant)}
    return found


def is_slots(target: ast.AST) -> bool:
    return isinstance(target, ast.Name) and target.id == "__slots__"


def is_text(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def private_names_asked_for(tree: ast.AST) -> set[str]:
    """Private names behind a dot, and those in texts, as for ``getattr``."""
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)}
    return asked | {
        node.value for node in ast.walk(tree) if is_text(node) and node.value.isidentifier() and is_private(node.value)
    }


OUR_NAMES = {name for module, tree in TREES.items() if module != "_torch" for name in names_given(tree)} | set(
    MAY_IMPORT
)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("_torch", "_counterless")])
def test_private_names_of_tensors_nodes_and_storages_are_in_one_module_too(name: str) -> None:
    """Whatever the object is called: a private name that nobody here has given is somebody else's."""
    told = TOLD_IN_TABLES.get(name, set()) | NOT_OF_TORCH.get(name, set()) | OF_SYS | {"_torchguard_guards"}
    assert private_names_asked_for(TREES[name]) - OUR_NAMES - IN_LINE - told == set()


def test_the_lists_of_private_names_have_none_that_is_not_used() -> None:
    used = {name: private_names_asked_for(tree) for name, tree in TREES.items() if name != "_torch"}
    assert set.union(*used.values()) >= IN_LINE
    for names in (TOLD_IN_TABLES, NOT_OF_TORCH):
        assert {module for module, listed in names.items() if listed - used[module]} == set()


def test_the_search_for_private_names_of_objects_finds_them() -> None:
    for source in ("storage._cdata", "getattr(node, '_saved_result')", "own['_parameters']"):
        assert private_names_asked_for(ast.parse(source)) - OUR_NAMES, source
    assert not private_names_asked_for(ast.parse("x.data.__class__; '_ is text'; y.data_ptr()"))
    assert private_names_asked_for(TREES["_torch"]) >= {"_cdata", "_saved_result", "_schema"}


@pytest.mark.parametrize("name", MODULES)
def test_private_names_of_our_own_modules_stay_in_them(name: str) -> None:
    """``_places._short`` is the business of ``_places``."""
    found = []
    for node in ast.walk(TREES[name]):
        names = chain(node) if isinstance(node, ast.Attribute) else []
        if len(names) > 1 and names[0] in MAY_IMPORT and is_private(names[1]):
            found.append(f"line {node.lineno}: {'.'.join(names)}")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torchguard."):
            inside = [
                alias.name for alias in node.names if f"{node.module}.{alias.name}"[len("torchguard.") :] not in FILES
            ]
            found += [f"line {node.lineno}: {inner}" for inner in inside if is_private(inner)]
    assert found == []


#: What hands out saves, maybe those of another thread.
HANDS_OUT_SAVES = {
    *("LEDGER.in_storage", "LEDGER.near", "LEDGER.all_alive", "LEDGER.across_storages"),
    *("saves_near", "saves_of", "detached_in_place", "rereads_of", "_latest", "alive"),
}

#: These hold them beyond their own frame, and who calls them answers for that.
HOLD_LONGER = {"_exports.saves", "_rereads.let_go"}


def unmarked_holders(module: str, tree: ast.AST) -> Iterator[str]:
    """Functions that are handed saves, and are not marked with ``holds_saves``."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
        asked = called & (HANDS_OUT_SAVES | {f"_writes.{name}" for name in HANDS_OUT_SAVES})
        asked |= {name for name in called if "pending[" in name}
        if asked and not any(ast.unparse(one).endswith(".holds_saves") for one in function.decorator_list):
            yield f"{module}.{function.name}"


def test_whoever_holds_saves_says_so() -> None:
    """Or another thread takes them for alive: see Note [Held by a look] in ``_ledger``."""
    found = {name for module in MODULES if module != "_ledger" for name in unmarked_holders(module, TREES[module])}
    assert found == HOLD_LONGER
    assert list(unmarked_holders("m", ast.parse("def f(x):\n return _writes.saves_of(x)"))) == ["m.f"]
    assert list(unmarked_holders("m", ast.parse("def f():\n return pending[-1]()"))) == ["m.f"]
    assert not list(unmarked_holders("m", ast.parse("@LEDGER.holds_saves\ndef f(x):\n return saves_of(x)")))


def test_files_that_are_named_in_texts_are_there() -> None:
    """What called a save is found by leaving out the guard's own files, of which some are told by name."""
    from torchguard._packing import OWN_FILES

    assert {Path(file) for file in OWN_FILES} <= set(FILES.values())


# ---- how a module opens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_a_module_opens_with_the_question_it_answers(name: str) -> None:
    docstring = ast.get_docstring(TREES[name])
    assert docstring, "no docstring"
    first = " ".join(docstring.split("\n\n")[0].split())
    assert "?" in first, first


def public(body: list[ast.stmt]) -> list[Any]:
    """Public functions and classes, and the public methods of public classes; of a property what gets it."""
    found: list[Any] = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if any(isinstance(one, ast.Attribute) and one.attr == "setter" for one in node.decorator_list):
                continue
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public(node.body)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name: str) -> None:
    missing = [f"{node.name} in line {node.lineno}" for node in public(TREES[name].body) if not ast.get_docstring(node)]
    assert missing == []


def test_names_only_in_init() -> None:
    """Told to the type checker by imports, found at run time by a table: importing the package imports no torch."""
    body = TREES["__init__"].body
    (for_the_type_checker,) = [node for node in body if isinstance(node, ast.If)]
    assert not imports(ast.Module(body, []), type_checking=False) - {"typing", "importlib"}
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    names = values["__all__"]
    assert names == sorted(names)
    assert values["_HOMES"] == {
        alias.asname or alias.name: node.module.removeprefix("torchguard.")
        for node in for_the_type_checker.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert set(names) == set(values["_HOMES"])
    for name in names:
        assert getattr(torchguard, name).__name__ == name
    assert set(names) <= set(dir(torchguard))


def test_what_the_plugin_and_the_command_line_start_with_reaches_no_torch() -> None:
    """At import time; what a function imports, it imports when it is needed."""
    for name in ("__main__", "pytest_plugin", "_switch"):
        reached, todo = set(), [name]
        while todo:
            module = todo.pop()
            if module not in reached:
                reached.add(module)
                top = [node for node in TREES[module].body if isinstance(node, (ast.Import, ast.ImportFrom))]
                found = imports(ast.Module(list(top), []))
                assert not {dotted for dotted in found if dotted.split(".")[0] in ("torch", "wrapt")}, module
                todo += [dotted.split(".")[1] for dotted in found if dotted.startswith("torchguard.")]
