"""`python -m ayllu` is `ayllu`."""

from ayllu.cli.main import main

main()
