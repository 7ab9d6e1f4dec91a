"""However training ends, the base is as it was loaded."""

from __future__ import annotations

import pytest
import torch

import vislora.jobs.train as job
from tests import tiny
from tests.inject.helpers import require_equal_states
from tests.jobs.train_helpers import config, trained
from vislora.errors import AdapterMismatchError, ConfigError
from vislora.inject.trained import inject_trained
from vislora.jobs import fresh
from vislora.models.base import load_family
from vislora.records import Done, Progress

CPU = torch.device("cpu")


@pytest.fixture
def bases(monkeypatch):
    """Return the list of the bases that training loads."""
    seen = []

    def kept(*arguments):
        seen.append(load_family(*arguments))
        return seen[-1]

    monkeypatch.setattr(job, "load_family", kept)
    return seen


def require_as_loaded(base, family):
    unchanged = load_family(tiny.saved(family), torch.float32, CPU)
    for component, module in base.components.items():
        require_equal_states(module.state_dict(), unchanged.components[component].state_dict())
        assert [type(layer) for layer in module.modules()] == [
            type(layer) for layer in unchanged.components[component].modules()
        ]
        assert not any("vislora" in key for layer in module.modules() for key in layer.__dict__)


@pytest.mark.quick("sd")
@pytest.mark.parametrize("family", tiny.STAPLES)
def test_the_base_is_as_before(family, tmp_path, bases):
    trained(tmp_path, family, adapter__text_encoders=True, sample__every=4, sample__prompts=("a cat",))
    require_as_loaded(bases[0], family)


@pytest.mark.parametrize("failing", ["te:clip_g", "te:t5"])
def test_a_component_that_cannot_have_its_adapter_leaves_none_on_the_others(failing, tmp_path, bases, monkeypatch):
    def inject(model, *rest):
        if model is bases[0].components[failing]:
            raise AdapterMismatchError("a layer has a forward of its own")
        return inject_trained(model, *rest)

    monkeypatch.setattr(fresh, "inject_trained", inject)
    with pytest.raises(AdapterMismatchError, match="of its own"):
        trained(tmp_path, "sd3", adapter__text_encoders=True)
    require_as_loaded(bases[0], "sd3")


def test_a_run_that_ends_early_leaves_no_adapter_on_the_base(tmp_path, bases):
    records = job.run(config(tmp_path, "sd"))
    while (record := next(records)) and not (isinstance(record, Progress) and record.task == "training"):
        assert not isinstance(record, Done)
    with pytest.raises(AssertionError):
        require_as_loaded(bases[0], "sd")
    records.close()
    require_as_loaded(bases[0], "sd")
    with pytest.raises(ConfigError, match="a kohya file cannot hold"):
        trained(tmp_path, "sd3", output=tmp_path / "other", adapter__algorithm="loha", format="kohya")
    require_as_loaded(bases[1], "sd3")
