"""Small programs, one per engine, each in its own process: jobs as JSON in, moments as JSON lines out."""
