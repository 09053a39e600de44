"""What tests of many adapters share."""

import pytest
from many_nets import adapted, each_alone


@pytest.fixture(scope="module")
def each():
    """What each adapter gives alone."""
    return each_alone()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The adapters in folders."""
    folder = tmp_path_factory.mktemp("many")
    adapted().save_pretrained(folder)
    return folder
