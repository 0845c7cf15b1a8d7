"""Anthropic's Messages dialect: bodies to requests for the engine, its events to messages. Knows no HTTP."""
