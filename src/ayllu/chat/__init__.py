"""Conversations to tokens and back: tokenizers, chat formats, tool calls, image tiles. Needs no torch."""
