"""The service: HTTP in OpenAI's, Anthropic's and our own shapes, sign-in, limits, stored runs."""
