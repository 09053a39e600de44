"""`make compat`, in small: the installed PEFT opens ours by every route, and we its own."""

import compat
import numpy as np
import pytest
from compat_reader import NATIVE, read_all

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    adapters = ("jax dense", "torch, no bases", "jax, biases")
    models = compat.prepare(work, families=("gpt2",), adapters=adapters)
    read_all(work, out)
    return models, out, compat.compare(models, out)


def test_every_route(outcome):
    _, _, found = outcome
    assert found.failures() == []
    routes = [name.split("|")[-1] for name in found.errors]
    six = ("PeftModel", "low_cpu_mem_usage", "AutoPeftModelFor", "load_adapter", "from_pretrained")
    assert {route: routes.count(route) for route in set(routes)} == dict.fromkeys(six, 3) | {
        "second adapter": 2,
        **dict.fromkeys(NATIVE, 2),
    }
    assert list(found.refused) == ["gpt2|jax dense|beside a native one"]
    assert "| 3 of 3 |" in compat.table([found]) and "1 of 1 refused" in compat.table([found])


def test_a_wrong_route_is_caught(outcome):
    """Logits of another adapter, a mixture that was let through, an error."""
    models, out, _ = outcome
    found = dict(np.load(out / "logits.npz"))
    one, two = "gpt2|jax dense|PeftModel", "gpt2|torch, no bases|PeftModel"
    found[one], found["gpt2|jax dense|beside a native one"] = found[two], found[one]
    np.savez(out / "logits.npz", **found)
    wrong = compat.compare(models, out)
    wrong.refused[two] = "KeyError: 'x'"
    assert [failure.split(":")[0] for failure in wrong.failures()] == [
        one,
        "gpt2|jax dense|beside a native one",
        two,
    ]
    assert "| 1 of 3 |" in compat.table([wrong])
