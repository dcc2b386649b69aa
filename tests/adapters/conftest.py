"""Lets the tests of this folder import the specimens, which pytest's importlib mode does not by itself."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=[0.0, float("inf")], ids=["as weight", "through factors"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which updates made of factors run, whatever the size of the layer."""
    for kind in ("loha.Loha", "lokr.Lokr"):  # by name: what is imported here is not checked by jaxtyping's hook
        monkeypatch.setattr(f"refiners.adapters.{kind}.largest_share", request.param)
