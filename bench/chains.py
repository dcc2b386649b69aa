"""A chain against `nn.Sequential` with the same layers, and against the same code written by hand."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from bench.timing import Row, ratio_row

Build = Callable[[Iterable[nn.Module]], nn.Module]


def sequential(layers: Iterable[nn.Module]) -> nn.Module:
    return nn.Sequential(*layers)


def identities(build: Build) -> nn.Module:
    return build([nn.Identity() for _ in range(100)])


def nested(build: Build, depth: int = 4, width: int = 4) -> nn.Module:
    return build([nn.Identity() if depth == 1 else nested(build, depth - 1, width) for _ in range(width)])


def linears(build: Build) -> nn.Module:
    return build([nn.Linear(32, 32) for _ in range(50)])


class ByHand(nn.Module):
    """Eight residual blocks that add a time embedding and attend to a text, as a UNet's transformer does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.activation = fl.SiLU()
        self.time = nn.ModuleList(fl.Linear(width, width) for _ in range(8))
        self.inner = nn.ModuleList(fl.Linear(width, width) for _ in range(8))
        self.text = nn.ModuleList(fl.Linear(width, width) for _ in range(8))
        self.outer = nn.ModuleList(fl.Linear(width, width) for _ in range(8))

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for by_time, inner, by_text, outer in zip(self.time, self.inner, self.text, self.outer, strict=True):
            h = self.activation(inner(x) + by_time(time))
            x = x + outer(h + by_text(text))
        return x


def with_contexts(width: int) -> fl.Chain:
    """What `ByHand` computes, with time and text read from contexts."""
    return fl.Chain(
        fl.Residual(
            fl.Linear(width, width),
            fl.Residual(fl.UseContext("diffusion", "time"), fl.Linear(width, width)),
            fl.SiLU(),
            fl.Residual(fl.UseContext("diffusion", "text"), fl.Linear(width, width)),
            fl.Linear(width, width),
        )
        for _ in range(8)
    )


def same_weights(chain: fl.Chain, by_hand: ByHand) -> None:
    names = {"Linear_1": "inner", "Residual_1.Linear": "time", "Residual_2.Linear": "text", "Linear_2": "outer"}
    theirs = by_hand.state_dict()
    chain.load_state_dict(
        {
            f"Residual_{index + 1}.{ours}.{tensor}": theirs[f"{name}.{index}.{tensor}"]
            for index in range(8)
            for ours, name in names.items()
            for tensor in ("weight", "bias")
        }
    )


def run(model: nn.Module, x: Tensor, has_gradients: bool) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return model(x)

    def forward_and_backward() -> Any:
        model(x).sum().backward()

    return forward_and_backward if has_gradients else forward


def context_rows(width: int, batch: int) -> list[Row]:
    by_hand, chain = ByHand(width), with_contexts(width)
    same_weights(chain, by_hand)
    x, time, text = (torch.randn(batch, width) for _ in range(3))

    def ours(has_gradients: bool) -> Callable[[], Any]:
        def call() -> Any:
            chain.set_context("diffusion", {"time": time, "text": text})
            output = chain(x)
            return output.sum().backward() if has_gradients else output

        return call if has_gradients else torch.no_grad()(call)

    def peer(has_gradients: bool) -> Callable[[], Any]:
        def call() -> Any:
            output = by_hand(x, time, text)
            return output.sum().backward() if has_gradients else output

        return call if has_gradients else torch.no_grad()(call)

    torch.testing.assert_close(ours(False)(), peer(False)())
    return [
        ratio_row(f"chain reading contexts, width {width}, batch {batch}, {mode}", ours(grad), peer(grad), 1.1)
        for mode, grad in (("no_grad", False), ("gradients", True))
    ]


def rows() -> list[Row]:
    found: list[Row] = []
    cases = {"100 identities": identities, "nested 4 deep x 4 wide": nested, "50 Linear(32, 32)": linears}
    for name, make in cases.items():
        ours, peer = make(fl.Chain), make(sequential)
        for mode, has_gradients in (("no_grad", False), ("gradients", True)):
            x = torch.randn(4, 32, requires_grad=has_gradients)
            found.append(ratio_row(f"{name}, {mode}", run(ours, x, has_gradients), run(peer, x, has_gradients), 1.02))
    return [*found, *context_rows(64, 16), *context_rows(320, 64)]
