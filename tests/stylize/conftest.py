"""A stylizer of a small network: made once for the tests of this folder."""

import pytest

from adaconv.stylize.stylizer import Stylizer
from tests.helpers import save_checkpoint


@pytest.fixture(scope="package")
def stylizer(tmp_path_factory):
    return Stylizer.from_folder(save_checkpoint(tmp_path_factory.mktemp("model"))[1])
