"""Refiners: the simplest way to train and run adapters on top of foundation models."""
