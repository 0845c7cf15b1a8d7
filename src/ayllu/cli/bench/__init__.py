"""`ayllu bench`: a model's speed here, beside other programs that can run it and the machine's limits."""
