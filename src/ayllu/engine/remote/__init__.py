"""Models behind any OpenAI-compatible server, as one more `Engine`."""
