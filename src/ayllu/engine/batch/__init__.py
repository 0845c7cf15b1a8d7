"""Files of many requests, answered by an engine and resumable at any moment."""
