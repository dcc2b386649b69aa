"""Adapters: edits of a tree that can be undone exactly."""

from refiners.adapters.adapter import Adapter
from refiners.adapters.lora import Conv2dLora, LinearLora, Lora, LoraAdapter

__all__ = ["Adapter", "Conv2dLora", "LinearLora", "Lora", "LoraAdapter"]
