"""OpenAI's shapes: bodies to requests, events to responses. Every field is honoured or refused by name."""
