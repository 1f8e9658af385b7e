"""Keys, certificates and a running server for the tests of the peer link."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]] | None:
    # The agent runs on uvloop; asyncio's own loop is the reference.
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def make_certificate(directory: Path, name: str) -> None:
    directory.mkdir(parents=True)
    key, certificate = directory / "node.key", directory / "node.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories a, b and stranger; a and b trust each other."""
    root = tmp_path_factory.mktemp("identities")
    for name in ("a", "b", "stranger"):
        make_certificate(root / name, name)
        (root / name / "peers").mkdir()
    for name, peer in (("a", "b"), ("b", "a"), ("stranger", "b")):
        text = (root / peer / "node.crt").read_text()
        (root / name / "peers" / f"{peer}.crt").write_text(text)
    return root
