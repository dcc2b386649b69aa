"""The generator of drawings against a plain computation with torch, under the names of the authors' files."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from refiners.foundationals.preprocessors import DrawingSpec, InformativeDrawings, load_informative_drawings
from refiners.foundationals.preprocessors.informative_drawings import AUTHORS_NAMES

SMALL = DrawingSpec(channels=(8, 12, 16), residual_blocks=2)


def plain(x: Tensor, weights: dict[str, Tensor], blocks: int) -> Tensor:
    def convolved(x: Tensor, name: str, padding: int) -> Tensor:
        x = functional.pad(x, [padding] * 4, mode="reflect")
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    norm = functional.instance_norm
    x = norm(convolved(x, "model0.1", 3)).relu()
    for name in ("model1.0", "model1.3"):
        x = norm(functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 2, 1)).relu()
    for block in range(blocks):
        h = norm(convolved(x, f"model2.{block}.conv_block.1", 1)).relu()
        x = x + norm(convolved(h, f"model2.{block}.conv_block.5", 1))
    for name in ("model3.0", "model3.3"):
        x = norm(functional.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 2, 1, 1)).relu()
    return convolved(x, "model4.1", 3).sigmoid()


def random_weights(model: InformativeDrawings) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = {
        str(AUTHORS_NAMES.to_theirs(name)): torch.randn(tensor.shape) for name, tensor in model.state_dict().items()
    }
    return {name: 0.3 * tensor / max(tensor[0].numel(), 1) ** 0.5 for name, tensor in weights.items()}


def test_drawings_and_gradients_equal_the_plain_computation() -> None:
    ours = InformativeDrawings(SMALL)
    weights = {name: tensor.requires_grad_() for name, tensor in random_weights(ours).items()}
    ours.load_state_dict({str(AUTHORS_NAMES.to_ours(name)): tensor.detach() for name, tensor in weights.items()})
    picture = torch.rand(2, 3, 20, 28)
    drawing, expected = ours(picture), plain(picture, weights, SMALL.residual_blocks)
    assert drawing.shape == (2, 1, 20, 28) and expected.std() > 0.01
    assert torch.allclose(drawing, expected, atol=1e-5)
    for output in (drawing, expected):
        output.square().mean().backward()
    for name, parameter in ours.named_parameters():
        gradient = weights[str(AUTHORS_NAMES.to_theirs(name))].grad
        assert parameter.grad is not None and gradient is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6), name


def test_a_file_of_the_authors_loads_whole_or_not_at_all(tmp_path: Path) -> None:
    weights = random_weights(InformativeDrawings(device="meta"))
    torch.save(weights, path := tmp_path / "netG_A_latest.pth")
    loaded = load_informative_drawings(path)
    picture = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(loaded(picture), plain(picture, weights, 3), atol=1e-5)
    torch.save({**weights, "model5.1.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"netG_A_latest.pth: 1 tensors have no place \(first: 'model5.1.weight'"):
        load_informative_drawings(path)


def test_pictures_of_any_size_and_mode_are_drawn() -> None:
    model = InformativeDrawings(SMALL)
    for mode, size in (("RGB", (33, 21)), ("L", (16, 16)), ("RGBA", (18, 40))):
        drawing = model.draw(Image.new(mode, size, 100 if mode == "L" else (90, 10, 30, 255)[: len(mode)]))
        assert drawing.mode == "L" and drawing.size == size
