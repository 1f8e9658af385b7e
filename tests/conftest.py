"""Lets tests import the collection's plugins by their full names, from the work tree."""

import sys
from pathlib import Path
from types import ModuleType


def pytest_configure() -> None:
    root = Path(__file__).parent.parent
    for name, path in (
        ("ansible_collections", root / "build" / "collections" / "ansible_collections"),
        (
            "ansible_collections.umbra",
            root / "build" / "collections" / "ansible_collections" / "umbra",
        ),
        ("ansible_collections.umbra.mail", root),
    ):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
