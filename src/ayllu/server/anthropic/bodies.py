"""Placeholder until the dialect lands."""
from ayllu.engine.openai.body import Strict
class MessagesBody(Strict):
    model: str
class CountTokensBody(Strict):
    model: str
def messages_call(body, *, tenant, image_of=None): raise NotImplementedError
def count_tokens_call(body, *, tenant, image_of=None): raise NotImplementedError
