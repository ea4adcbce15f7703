"""`python -m fusekit`."""

from fusekit.cli import main

main()
