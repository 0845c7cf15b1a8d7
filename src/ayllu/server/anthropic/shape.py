"""Placeholder until the dialect lands."""
from ayllu.engine.openai.results import error_body
class MessagesShape: ...
def status_of(error): return error.http_status
