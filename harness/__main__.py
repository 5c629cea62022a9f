"""`python -m harness`, for launchers that run modules."""

from harness.cli import main

main()
