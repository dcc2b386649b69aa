"""Adapters: edits of a tree that can be undone exactly."""

from refiners.adapters.adapter import Adapter
from refiners.adapters.delta import Delta
from refiners.adapters.delta_adapter import DeltaAdapter
from refiners.adapters.lora import Conv2dLora, LinearLora, Lora, LoraAdapter

__all__ = ["Adapter", "Conv2dLora", "Delta", "DeltaAdapter", "LinearLora", "Lora", "LoraAdapter"]
