"""A LoRA-adapted Linear(1024, 1024), unmerged, against peft's: what the adapters cost over the plain layer."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from bench.timing import Row, ratio_row
from refiners.adapters.lora import LoraAdapter

WIDTH, RANK, BATCH = 1024, 16, 64


def with_peft(base: nn.Linear, count: int) -> PeftModel:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(base), config, adapter_name="0")
    for index in range(1, count):
        model.add_adapter(str(index), config)
    model.base_model.set_adapter([str(index) for index in range(count)])
    return model


def with_refiners(base: nn.Linear, peft: PeftModel, count: int) -> fl.Chain:
    linear = fl.Linear(WIDTH, WIDTH)
    linear.load_state_dict(base.state_dict())
    chain = fl.Chain(linear)
    for index in range(count):
        adapter = LoraAdapter(linear, rank=RANK, name=str(index)).inject()
        layer: Any = peft.base_model.model[0]
        weights = (layer.lora_A[str(index)].weight, layer.lora_B[str(index)].weight)
        adapter.loras[str(index)].load_weights(*[weight.detach() for weight in weights])
    linear.requires_grad_(False)
    return chain


def call(model: nn.Module, x: Tensor, has_gradients: bool) -> Callable[[], Any]:
    trained = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def forward() -> Any:
        with torch.no_grad():
            return model(x)

    def forward_and_backward() -> Any:
        model(x).sum().backward()
        for tensor in trained:
            tensor.grad = None

    return forward_and_backward if has_gradients else forward


def rows() -> list[Row]:
    found: list[Row] = []
    for count, allowed in ((1, 1.0), (4, 0.5)):
        base = nn.Linear(WIDTH, WIDTH)
        plain = nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
        plain[0].load_state_dict(base.state_dict())
        peft = with_peft(base, count)
        ours = with_refiners(base, peft, count)
        for mode, has_gradients in (("no_grad", False), ("gradients", True)):
            x = torch.randn(BATCH, WIDTH, requires_grad=has_gradients)
            torch.testing.assert_close(ours(x), peft(x), rtol=1e-4, atol=1e-5)
            name = f"overhead of {count} LoRA, {mode}"
            calls = [call(model, x, has_gradients) for model in (ours, peft, plain)]
            found.append(ratio_row(name, calls[0], calls[1], allowed, plain=calls[2], round_s=0.02))
    return found
