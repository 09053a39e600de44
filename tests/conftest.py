"""What every test needs: no network, full-precision products, the same draws, Ctrl-C's signal.

Tests marked `torch` need torch, PEFT or transformers. Where one of these is not installed, they are
left out, and the last line of the report counts them.
"""

import ast
import os
import signal
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import jax
import numpy as np
import pytest
from hypothesis import settings

jax.config.update("jax_default_matmul_precision", "highest")

# A shell's background job ignores it, and whatever it starts would, too: some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiling takes longer than hypothesis' deadline; a failure must come back at the next run.
settings.register_profile("randlora", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("randlora")

HAS_TORCH = all(find_spec(name) for name in ("torch", "peft", "transformers"))
LEFT_OUT = pytest.StashKey[int]()


@pytest.fixture
def rng() -> np.random.Generator:
    """Numbers for one test, the same at every run."""
    return np.random.default_rng(0)


@pytest.fixture
def compiled():
    """Call it: how many programs XLA has compiled since the test began.

    JAX's own counts of a function's programs forget those that its caches drop.
    """
    programs = []

    def listen(event: str, duration_secs: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(programs)
    jax.monitoring.unregister_event_duration_listener(listen)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = 0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A module that imports torch cannot even be imported without it, so its source is read."""
    if HAS_TORCH or collection_path.suffix != ".py":
        return None
    module = ast.parse(collection_path.read_text()).body
    if not any(_marks_torch(statement) for statement in module):
        return None
    config.stash[LEFT_OUT] += sum(
        isinstance(statement, ast.FunctionDef) and statement.name.startswith("test")
        for statement in module
    )
    return True


def _marks_torch(statement: ast.stmt) -> bool:
    """Whether it is `pytestmark = pytest.mark.torch`, alone or in a list of marks."""
    return (
        isinstance(statement, ast.Assign)
        and ast.unparse(statement.targets[0]) == "pytestmark"
        and "pytest.mark.torch" in ast.unparse(statement.value)
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    if HAS_TORCH:
        return
    marked = [item for item in items if item.get_closest_marker("torch")]
    items[:] = [item for item in items if item not in marked]
    config.hook.pytest_deselected(items=marked)
    config.stash[LEFT_OUT] += len(marked)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist tells the first one, which collects nothing itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {"left_out": 0})["left_out"]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if count := config.stash[LEFT_OUT]:
        terminalreporter.write_line(
            f"left out: {count} tests that need torch, PEFT or transformers"
        )
