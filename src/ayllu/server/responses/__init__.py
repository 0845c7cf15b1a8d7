"""OpenAI's Responses: bodies to what an engine is asked, and its events to a response that can be resumed."""
