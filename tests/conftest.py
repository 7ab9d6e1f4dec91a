"""Which variants of a test `make test` runs: all, or of a test marked `quick` those that the mark names."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark as slow each variant that its test's `quick` mark leaves out; a mark that names no variant is an error."""
    marked = [(item, mark.args) for item in items if (mark := item.get_closest_marker("quick"))]
    unused = {(item.nodeid.partition("[")[0], name) for item, names in marked for name in names}
    for item, names in marked:
        named = [name for name in names if fnmatchcase(item.callspec.id, name)]
        unused -= {(item.nodeid.partition("[")[0], name) for name in named}
        if not named:
            item.add_marker(pytest.mark.slow)
    if unused and not any("::" in argument for argument in config.args):
        raise pytest.UsageError("\n".join(f"{test}: no variant is {name!r}" for test, name in sorted(unused)))


@pytest.fixture
def narrow_nf4(monkeypatch):
    """Allow nf4 in tiny models where the library misreads their narrow layers (CPUs with AVX-512)."""
    monkeypatch.setattr("vislora.models.quantized.is_misread", lambda width: False)
