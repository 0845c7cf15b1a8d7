"""`python -m ayllu` is `ayllu`."""

from ayllu.cli.start import main

main()
