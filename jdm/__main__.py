"""`python -m jdm`: the same as the command `jdm`."""

from jdm.cli import main

main()
