"""The obvious form of every fast kernel, in plain torch: what it computes is read here, not there."""
