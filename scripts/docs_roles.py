"""Docstrings name other objects as Sphinx does, :class:`X`; the site shows their names as code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|mod|attr|data|exc):`[~.]?([^`]+)`")


class Roles(griffe.Extension):
    """Called for every object once it was read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            # L[t][d] is no link either.
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value).replace("][", r"]\[")
