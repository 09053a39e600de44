"""What errors and warnings share: where they point, and how they write what they found."""

import sys
import types
import warnings

import pytest
from randlora_jax.interop.errors import listed, nearest, shown, warn

LIBRARY = """
import functools
from contextlib import contextmanager, suppress

@contextmanager
def scope():
    warn("in a context")
    yield

@functools.lru_cache
def cached():
    with suppress(ValueError):
        inner()

def inner():
    warn("deep inside")
"""


@pytest.fixture
def library():
    """A module of the library, as far as its name tells, in a file of its own."""
    module = types.ModuleType("randlora_jax.some.module")
    module.warn = warn
    exec(compile(LIBRARY, "library.py", "exec"), vars(module))
    return module


def line_above() -> int:
    return sys._getframe(1).f_lineno - 1


@pytest.mark.parametrize("function", ["cached", "inner"])
def test_a_warning_points_at_the_users_line(library, function):
    with pytest.warns(UserWarning) as caught:
        getattr(library, function)()
        line = line_above()
    assert [(x.filename, x.lineno) for x in caught] == [(__file__, line)]


def test_a_warning_on_entering_a_context_points_there(library):
    with pytest.warns(UserWarning) as caught, library.scope():
        line = line_above()
    assert [(x.filename, x.lineno) for x in caught] == [(__file__, line)]


def test_a_module_whose_name_begins_like_ours_is_the_users(library):
    program = types.ModuleType("randlora_jax_experiments")
    program.inner = library.inner
    with pytest.warns(UserWarning) as caught:
        exec(compile("inner()", "experiment.py", "exec"), vars(program))
    assert caught[0].filename == "experiment.py"


def test_filters_and_categories_work_as_elsewhere(library):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        with pytest.raises(DeprecationWarning, match="old"):
            warn("old", DeprecationWarning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            library.inner()
    assert len(caught) == 1  # once a line
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", module=__name__)
        library.inner()
    assert not caught


def test_values_are_shown_whole_or_short_and_always_printable():
    assert shown("layer.0") == "'layer.0'"
    assert shown(("q", 1)) == "('q', 1)"
    assert shown("a\x1b[31m\n\udc80").isprintable()
    assert shown("x" * 10**6).endswith("(1000000 characters)")
    assert len(shown("\0" * 10**6)) < 500
    assert len(shown(["x" * 10**6] * 2)) < 500


def test_several_names():
    assert listed([]) == ""
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed({"a": 1, "b": 2, "c": 3}, 2) == "'a', 'b' and 1 more"
    assert nearest("query", ["key", "queries"]) == "'queries', 'key'"
    assert nearest("query", (x for x in ["out", "x", "y", "queries"])).startswith("'queries', ")
    assert nearest("query", ["a", "b", "c", "d"]).endswith(" and 1 more")
