"""Small LoRA files of every kind and format at random weights, and what of them can be changed for the worse."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from lora_specimens import write
from torch import Tensor

Tensors = dict[str, Tensor]
LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # 64 to 64 features
CONVOLUTION = "unet.mid_block.resnets.0.conv1"  # 64 to 64 channels, 3x3
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"  # 32 to 32 features
CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # 32 to 64 features

# Of each kind, the parts and their shapes for a linear layer of 64 to 64 features.
_PARTS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoRA": {"lora_down.weight": (3, 64), "lora_up.weight": (64, 3), "alpha": ()},
    "DoRA": {"lora_down.weight": (3, 64), "lora_up.weight": (64, 3), "alpha": (), "dora_scale": (64, 1)},
    "LoHa": {"hada_w1_a": (64, 3), "hada_w1_b": (3, 64), "hada_w2_a": (64, 3), "hada_w2_b": (3, 64), "alpha": ()},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2_a": (16, 3), "lokr_w2_b": (3, 16), "alpha": ()},
    "LoKr whole": {"lokr_w1": (4, 4), "lokr_w2": (16, 16), "alpha": ()},
    "GLoRA": {"a1.weight": (64, 3), "a2.weight": (3, 64), "b1.weight": (64, 3), "b2.weight": (3, 64), "alpha": ()},
    "elementwise GLoRA": {"glora_A.Xd": (64, 3), "glora_A.Xu": (3, 64), "glora_B.X": (64, 1)},
    "IA3": {"weight": (64,), "on_input": ()},
    "difference": {"diff": (64, 64), "diff_b": (64,)},
    "OFT": {"oft_blocks": (4, 16, 16), "alpha": ()},
}
_TUCKER = {"lora_down.weight": (3, 64, 1, 1), "lora_mid.weight": (3, 3, 3, 3), "lora_up.weight": (64, 3, 1, 1)}
_CONVOLVED = {"lora_down.weight": (3, 64, 3, 3), "lora_up.weight": (64, 3, 1, 1), "alpha": ()}
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def random_parts(layer: str, shapes: dict[str, tuple[int, ...]], seed: int = 3) -> Tensors:
    """Tensors of kohya's names for a layer."""
    component, _, name = layer.partition(".")
    generator = torch.Generator().manual_seed(seed)
    tensors = {end: 0.1 * torch.randn(shape, generator=generator) for end, shape in shapes.items()}
    if "on_input" in tensors:
        tensors["on_input"] = torch.tensor(False)
    return {f"{_KOHYA[component]}{name.replace('.', '_')}.{end}": tensor for end, tensor in tensors.items()}


def dotted_lora() -> Tensors:
    """LoRAs as diffusers names them."""
    generator = torch.Generator().manual_seed(4)
    tensors: Tensors = {}
    for layer, (out, inner) in {LINEAR: (64, 64), TEXT: (32, 32), CROSS: (64, 32)}.items():
        tensors[f"{layer}.lora_A.weight"] = 0.1 * torch.randn(3, inner, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(out, 3, generator=generator)
    return tensors


# By the name of the kind or format, the tensors of a file.
CONTENTS: dict[str, Callable[[], Tensors]] = {
    **{kind: lambda shapes=shapes: random_parts(LINEAR, shapes) for kind, shapes in _PARTS.items()},
    "convolution": lambda: random_parts(CONVOLUTION, _CONVOLVED),
    "Tucker": lambda: random_parts(CONVOLUTION, _TUCKER),
    "norm": lambda: random_parts("unet.mid_block.resnets.0.norm1", {"w_norm": (64,), "b_norm": (64,)}),
    "mixed": lambda: random_parts(LINEAR, _PARTS["LoHa"]) | random_parts(CONVOLUTION, _CONVOLVED),
    "diffusers": dotted_lora,
}
SETTINGS: dict[str, object] = {"peft_type": "LORA", "r": 3, "lora_alpha": 2.0, "alpha_pattern": {"attn2.to_k": 5}}


def write_peft(folder: Path, settings: str | None = None) -> Path:
    """An adapter of the UNet, as peft saves it."""
    folder.mkdir(exist_ok=True)
    tensors = {key.split("unet.")[1]: tensor for key, tensor in dotted_lora().items() if key.startswith("unet.")}
    write(folder / "adapter_model.safetensors", {f"base_model.model.{key}": tensor for key, tensor in tensors.items()})
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS) if settings is None else settings)
    return folder


def write_torch(path: Path, tensors: Tensors, is_zip: bool = True) -> Path:
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    return path


def write_raw(path: Path, header: str | bytes, data: bytes, length: int | None = None) -> Path:
    """A safetensors file of any header, which may lie about its own length."""
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def split_file(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    """The header of a good safetensors file, and the bytes behind it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]
