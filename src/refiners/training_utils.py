"""The name that `refiners.training` had before."""

from refiners.training import *  # noqa: F403
