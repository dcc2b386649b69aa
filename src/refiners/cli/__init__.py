"""The command line: `refiners generate`, `refiners convert`, `refiners inspect`."""

from refiners.cli.app import main

__all__ = ["main"]
