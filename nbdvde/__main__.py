"""`python -m nbdvde` is the `nbdvde` command."""

from nbdvde.cli import main

main()
