"""`python -m refiners.cli`, the same as the command `refiners`."""

from refiners.cli.app import main

main()
