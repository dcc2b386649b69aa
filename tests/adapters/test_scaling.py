"""A scale as a layer."""

import pytest
import torch

from refiners.adapters.scaling import Scaling


def test_one_scale_is_for_all_and_several_are_for_samples_in_turn() -> None:
    x, scaling = torch.ones(4, 2), Scaling(0.5)
    assert torch.equal(scaling(x), torch.full((4, 2), 0.5))
    scaling.scale = [1.0, 3.0]
    assert scaling.scale == (1.0, 3.0) and scaling(x)[:, 0].tolist() == [1, 3, 1, 3]
    with pytest.raises(ValueError, match="scales for 2 samples, but the batch has 3"):
        scaling(x[:3])


def test_a_new_scale_goes_into_the_same_buffer_which_is_not_saved() -> None:
    scaling = Scaling()
    factor = scaling.factor
    scaling.scale = 2
    assert scaling.factor is factor and factor.item() == 2 and not scaling.state_dict()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [], [1.0, float("nan")]])
def test_a_scale_that_is_no_number_is_refused_and_the_old_one_stays(value: float) -> None:
    scaling = Scaling(0.5)
    with pytest.raises(ValueError, match=r"finite|no scales"):
        scaling.scale = value
    assert scaling.scale == 0.5 and scaling.factor.item() == 0.5


def test_the_factor_keeps_its_precision_whatever_the_tree_is_in() -> None:
    scaling = Scaling(0.1).half()
    assert scaling.factor.dtype == torch.float32 and scaling.factor.item() == pytest.approx(0.1, abs=1e-8)
    assert scaling(torch.ones(1, dtype=torch.float16)).dtype == torch.float16


def test_what_was_made_on_the_meta_device_gets_its_factor_when_it_moves() -> None:
    with torch.device("meta"):
        scaling = Scaling([0.5, 2.0])
    assert scaling.factor.is_meta
    assert scaling.to("cpu").factor.tolist() == [0.5, 2.0]


def test_a_copy_has_a_scale_of_its_own() -> None:
    scaling = Scaling(0.5)
    copy = scaling.structural_copy()
    copy.scale = 2
    assert scaling.factor.item() == 0.5 and copy.factor.item() == 2
