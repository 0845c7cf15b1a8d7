"""Generation: requests in, tokens out."""
