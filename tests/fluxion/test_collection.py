"""The garbage collector is off inside, and as it was before afterwards."""

import gc

import pytest

from refiners.fluxion.collection import collection_paused


@pytest.mark.parametrize("was_on", [True, False])
def test_it_is_as_before_afterwards(was_on: bool) -> None:
    try:
        if not was_on:
            gc.disable()
        with pytest.raises(KeyError), collection_paused(), collection_paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == was_on
    finally:
        gc.enable()
