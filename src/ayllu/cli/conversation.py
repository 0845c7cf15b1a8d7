"""The conversation on a terminal: reads turns and `/` commands, streams answers.

Ctrl-C stops the answer and keeps what was said; at the prompt it clears the line. Ctrl-D leaves.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from ayllu.chat.messages import Message, user_message
from ayllu.cli.terminal import read_image, write_answer
from ayllu.engine.memory_plan import size_text
from ayllu.engine.parameters import Sampling
from ayllu.engine.reply import Reply
from ayllu.engine.requests import ChatPrompt, GenerateRequest
from ayllu.errors import AylluError, UsageError, did_you_mean
from ayllu.paths import expanded

if TYPE_CHECKING:
    from ayllu.cli.measure import Timing
    from ayllu.engine.native import NativeEngine

HELP = """\
Enter sends; Alt+Enter (or Esc, then Enter) starts a new line. Ctrl-C stops an answer, Ctrl-D leaves.
  /new              start a new conversation (the system prompt stays)
  /system [TEXT]    show or set the system prompt
  /image FILE       put an image before your next message
  /set [NAME VALUE] show or set temperature, top_p, top_k, min_p, seed, max_tokens, repetition_penalty,
                    presence_penalty, frequency_penalty
  /retry            answer the last message again
  /undo             take back the last message and its answer
  /history          print the conversation
  /save FILE        write the conversation as JSON
  /load FILE        continue a saved conversation
  /model            what is loaded, and how full its context is
  /help             this list
  /exit             leave"""


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    return bindings


def _history() -> History:
    """Typed lines, kept between runs in a file only this user can read; in memory if that cannot be."""
    folder = Path(platformdirs.user_state_dir("ayllu", appauthor=False))
    file = folder / "chat-history"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


class Conversation:
    """One person, one model, one terminal."""

    def __init__(
        self,
        engine: NativeEngine,
        *,
        system: str | None,
        images: list[bytes],
        sampling: Sampling,
        max_tokens: int | None,
        clock: Timing | None,
    ) -> None:
        self.engine = engine
        self.name = engine.info.model
        self.system = system
        self.images = images
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.clock = clock
        self.messages: list[Message] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/new": self._new,
            "/system": self._system,
            "/image": self._image,
            "/set": self._set,
            "/retry": self._retry,
            "/undo": self._undo,
            "/history": self._history,
            "/save": self._save,
            "/load": self._load,
            "/model": self._model,
            "/help": lambda _: print(HELP),
            "/exit": self._exit,
        }

    def run(self) -> None:
        """Read and answer until the person leaves."""
        facts, context = self.engine.info.facts, self.engine.info.context
        needed, free = size_text(int(facts["total_bytes"])), size_text(int(facts["available_bytes"]))
        print(
            f"{self.name}, {facts['dtype']} on {facts['device']}: {context:,} tokens of context, "
            f"{needed} of {free} free memory. /help lists the commands."
        )
        session: PromptSession[str] = PromptSession(
            history=_history(),
            completer=WordCompleter(list(self.commands), sentence=True),
            complete_while_typing=False,
            multiline=True,
            key_bindings=_key_bindings(),
            prompt_continuation="  ",
        )
        while True:
            try:
                line = session.prompt(ANSI("\n\x1b[1m>\x1b[0m "))
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            try:
                self.handle(line)
            except SystemExit:
                return
            except KeyboardInterrupt:
                print("(stopped)")
            except AylluError as error:
                print(f"{error.problem} {error.fix}".rstrip(), file=sys.stderr)

    def handle(self, line: str) -> None:
        """One line the person entered: a command or a message. Raises SystemExit to leave."""
        line = line.strip()
        if not line:
            return
        if not line.startswith("/"):
            self._ask(line)
            return
        command, _, rest = line.partition(" ")
        if command not in self.commands:
            raise UsageError(
                f"There is no command {command}.{did_you_mean(command, self.commands)}", "/help lists them."
            )
        self.commands[command](rest.strip())

    def _ask(self, text: str) -> None:
        before = list(self.messages)
        self.messages.append(user_message(text, self.images))
        self._answer_or_restore(before)
        self.images = []

    def _answer_or_restore(self, before: list[Message]) -> None:
        """Answer; what cannot be answered is not kept, or every later turn would fail with it."""
        try:
            self._answer()
        except (AylluError, KeyboardInterrupt):
            self.messages = before
            raise

    def _answer(self) -> None:
        reply = Reply(
            self.engine.submit(
                GenerateRequest(
                    prompt=ChatPrompt(tuple(self._said())),
                    sampling=self.sampling,
                    max_new_tokens=self.max_tokens,
                )
            )
        )
        pieces: list[str] = []
        try:
            for piece in reply:
                pieces.append(piece)
                write_answer(piece)
        except KeyboardInterrupt:
            pieces.append(reply.stop())
            write_answer(pieces[-1])
            print(" (stopped)", end="")
        print()
        if reply.finish_reason == "length":
            print("(the answer reached its longest length; ask to continue)")
        self.messages.append(Message("assistant", "".join(pieces)))
        if self.clock is not None:
            self.clock.report(reply, self.engine)

    def _said(self) -> list[Message]:
        """The conversation as the model gets it."""
        return [*([Message("system", self.system)] if self.system else []), *self.messages]

    def _new(self, _: str) -> None:
        self.messages.clear()
        self.images = []
        print("A new conversation.")

    def _system(self, text: str) -> None:
        if text:
            self.system = text
        print(f"System prompt: {self.system or '(none)'}")

    def _image(self, path: str) -> None:
        if not path:
            raise UsageError("Which image?", "Use /image FILE.")
        try:
            name = shlex.split(path)[0]
        except ValueError as error:
            raise UsageError(f"{path} has an open quotation mark.", "Use /image 'FILE'.") from error
        self.images.append(read_image(expanded(name)))
        print(f"{len(self.images)} image(s) go with your next message.")

    def _set(self, text: str) -> None:
        fields = [field.name for field in dataclasses.fields(Sampling) if field.name != "logit_bias"]
        known = [*fields, "max_tokens"]
        if text:
            name, _, value = text.partition(" ")
            if name not in known:
                raise UsageError(
                    f"There is no setting {name}.{did_you_mean(name, known)}", f"Known: {known}."
                )
            if name == "max_tokens":
                self.max_tokens = _whole(name, value)
                if self.max_tokens is not None and self.max_tokens < 1:
                    self.max_tokens = None
                    raise UsageError(
                        "max_tokens must be at least 1.", "Use /set max_tokens off for no limit."
                    )
            elif name == "seed":
                self.sampling = dataclasses.replace(self.sampling, seed=_whole(name, value))
            else:
                convert = int if name == "top_k" else float
                self.sampling = dataclasses.replace(self.sampling, **{name: _number(name, value, convert)})
        for name in fields:
            print(f"  {name} = {getattr(self.sampling, name)}")
        print(f"  max_tokens = {self.max_tokens}")

    def _retry(self, _: str) -> None:
        before = list(self.messages)
        while self.messages and self.messages[-1].role == "assistant":
            self.messages.pop()
        if not self.messages:
            raise UsageError("There is nothing to answer again.", "Say something first.")
        self._answer_or_restore(before)

    def _undo(self, _: str) -> None:
        while self.messages and self.messages.pop().role != "user":
            pass
        print(f"{len(self.messages)} messages remain.")

    def _history(self, _: str) -> None:
        for message in self.messages:
            print(f"{message.role}: {message.text}")

    def _save(self, path: str) -> None:
        if not path:
            raise UsageError("Where to?", "Use /save FILE.")
        turns = [{"role": message.role, "content": message.text} for message in self.messages]
        document = {"model": self.name, "system": self.system, "messages": turns}
        try:
            expanded(path).write_text(json.dumps(document, ensure_ascii=False, indent=2), "utf-8")
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written: {error.strerror}.", "Choose another file."
            ) from error
        print(f"Saved {len(turns)} messages to {path} (images are not saved).")

    def _load(self, path: str) -> None:
        try:
            document = json.loads(expanded(path).read_text("utf-8"))
            messages = [Message(turn["role"], str(turn["content"])) for turn in document["messages"]]
            system = document.get("system")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{path} is not a saved conversation.", "Use a file written by /save."
            ) from error
        if any(message.role not in ("user", "assistant") for message in messages):
            raise UsageError(f"{path} has an unknown role.", "Use a file written by /save.")
        self.messages, self.system = messages, system if isinstance(system, str) else None
        print(f"Loaded {len(messages)} messages.")

    def _model(self, _: str) -> None:
        said = self._said()
        files, info = self.engine.files, self.engine.info
        used = len(files.chat_format.render(said).token_ids) if said else 0
        millions = files.checkpoint.config.parameters / 1e6
        print(f"{self.name}: {millions:,.0f}M parameters, {info.facts['dtype']} on {info.facts['device']}")
        print(f"context: {used} of {info.context} tokens")
        print(f"memory: {info.facts['memory']}")

    def _exit(self, _: str) -> None:
        raise SystemExit


def _whole(name: str, value: str) -> int | None:
    """A whole number, or None for a setting that is to be off."""
    return None if value.strip().lower() in ("none", "off") else int(_number(name, value, int))


def _number(name: str, value: str, convert: Callable[[str], float]) -> Any:
    try:
        return convert(value)
    except ValueError as error:
        raise UsageError(f"{value!r} is not a number for {name}.", f"Use /set {name} NUMBER.") from error
