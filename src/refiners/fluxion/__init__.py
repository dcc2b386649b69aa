"""Fluxion: models as trees that a person can read."""
