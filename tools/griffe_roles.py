"""How do docstrings, which are written for readers of the source, become the pages of the reference?

A griffe extension, named in ``mkdocs.yml``. What a role names (``:class:`Guard```) becomes a link where the reference
has an entry for it, and code where not; members that say "(Called by torchguard.)" in their first paragraph are left
out.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|exc|mod):`~?([\w.]+)`")
_INTERNAL = re.compile(r"\((?:Asked|Called|Told|Used) by \w+[^)]*\)$")


def linked(text: str, public: dict[str, str]) -> str:
    """A docstring in Markdown; ``public`` says where what is in the reference."""

    def link(role: re.Match[str]) -> str:
        name = role[1].removeprefix("torchguard.")
        return f"[`{name}`][{public[name]}]" if name in public else f"`{name}`"

    return _ROLE.sub(link, text)


class Roles(griffe.Extension):
    """What griffe calls."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """The whole package is read: mend its docstrings."""
        public = {str(name): f"{pkg.path}.{name}" for name in pkg.exports or ()}
        self._mend(pkg, public)

    def _mend(self, parent: griffe.Module | griffe.Class, public: dict[str, str]) -> None:
        for name, member in list(parent.members.items()):
            if isinstance(member, griffe.Alias):
                continue
            if member.docstring is not None:
                if _INTERNAL.search(member.docstring.value.partition("\n\n")[0].strip()):
                    del parent.members[name]
                    continue
                member.docstring.value = linked(member.docstring.value, public)
            if isinstance(member, (griffe.Module, griffe.Class)):
                self._mend(member, public)
