"""OpenAI's chat and text completions, as streams of chunks."""
