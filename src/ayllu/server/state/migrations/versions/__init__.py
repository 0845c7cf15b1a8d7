"""One file for each schema. They never change once released, so they share nothing with `tables`."""
