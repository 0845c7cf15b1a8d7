"""A real llama.cpp server on loopback, in a process of its own: the independent implementation that the
remote engine is tested against. Run as a script with a model, it serves until its standard input is closed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SLOTS = 4
SLOT_CONTEXT = 2048
MODEL = "smol"

# ChatML with tools, which SmolLM2's own template leaves out.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Call a function by writing
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
These are the functions:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" and message.tool_calls %}<|im_start|>assistant
{{ message.content or "" }}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == "tool" %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_ADDRESS = "listening on "


@contextmanager
def llama_server(model: Path) -> Iterator[str]:
    """The address of a server with this GGUF model, for the length of the block. It chats, completes and
    embeds, in `SLOTS` slots of `SLOT_CONTEXT` tokens, under the model name `MODEL`."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            # llama.cpp may write to the same place; the end of the process ends the search.
            for line in process.stdout:
                if line.startswith(_ADDRESS):
                    yield line.removeprefix(_ADDRESS).strip()
                    break
            else:
                log.seek(0)
                raise AssertionError(f"the llama.cpp server did not start: {log.read()[-2000:]}")
        finally:
            process.kill()
            process.communicate()


def serve(model: str) -> None:
    """Serve until standard input ends, as it does with the process at its other end."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = MODEL
    params.port = 0
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * SLOT_CONTEXT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # A waiting stream holds a thread.
    params.n_threads_http = 32
    params.use_jinja = True
    params.chat_template = TEMPLATE
    params.prefill_assistant = False
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.warmup = False
    server = xllamacpp.Server(params)
    print(_ADDRESS + server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1])
