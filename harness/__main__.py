"""`python -m harness` is the command `orrery`."""

from harness.cli import main

main()
