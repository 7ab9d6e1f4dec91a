"""What all tests of jobs share."""

from __future__ import annotations

import pytest

from vislora.jobs import train


@pytest.fixture(autouse=True)
def no_estimate(monkeypatch):
    """Runs say nothing of memory: that takes a third of a tiny run, and has tests of its own (training/test_memory)."""
    monkeypatch.setattr(train, "_memory", lambda *given: iter(()))
