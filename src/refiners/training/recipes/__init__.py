"""Recipes: what to train of a model, each with the settings it needs."""
