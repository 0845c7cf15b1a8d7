"""From a folder to an answer through the engine: a small Llama 4 sees pictures; templates are found."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from ayllu.chat.messages import Message, user_message
from ayllu.chat.tokenizer import load_tokenizer
from ayllu.engine.model_files import chat_template
from ayllu.engine.native import open_engine
from ayllu.engine.options import EngineOptions
from ayllu.engine.parameters import Sampling
from ayllu.engine.reply import Reply
from ayllu.engine.requests import ChatPrompt, GenerateRequest
from ayllu.errors import ContextOverflowError, ModelFileError, UsageError
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint
from ayllu.weights.hf_save import save_folder
from tests.chat.small_vocabularies import write_model_folder, write_tiktoken
from tests.model.tiny import tiny_llama, tiny_llama4
from tests.weights.small_checkpoints import random_checkpoint

GREEDY = Sampling(temperature=0)


def _llama4_folder(folder: Path, *, vision: bool = True) -> Path:
    tokenizer = load_tokenizer(write_tiktoken(folder / "vocabulary"))
    config = dataclasses.replace(tiny_llama4(vision=vision), vocab_size=tokenizer.vocab_size)
    if config.vision is not None:
        patch = tokenizer.special_id("<|patch|>")
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, patch_token_id=patch))
    save_folder(random_checkpoint(config, seed=2), folder / "model")
    return write_tiktoken(folder / "model")


def _picture(size: tuple[int, int], colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def _request(message: Message, **changes: object) -> GenerateRequest:
    return GenerateRequest(prompt=ChatPrompt((message,)), sampling=GREEDY, max_new_tokens=4, **changes)


def test_a_small_llama4_folder_answers_about_pictures(tmp_path: Path) -> None:
    """Each picture takes its places in the prompt, is cut into tiles, and is read by the tower."""
    with open_engine(_llama4_folder(tmp_path), EngineOptions(dtype="float32", context=120)) as engine:
        assert engine.info.reads_images
        replies = [
            Reply(engine.submit(_request(user_message("what?", pictures))))
            for pictures in ([], [_picture((40, 40), "red")], [_picture((112, 112), "red")])
        ]
        texts = ["".join(reply) for reply in replies]
        text_only, one_tile, four_tiles = (reply.prompt_tokens for reply in replies)
        # One tile of 4x4 patches, shuffled 2x2, is 4 rows between the start, image and end markers.
        assert one_tile - text_only == 4 + 3
        assert four_tiles - text_only == 4 * 5 + 4 + 3
        assert len(texts) == 3
        for reply in replies:
            assert reply.new_tokens <= 4
            assert reply.finish_reason in ("stop", "length")
        with pytest.raises(ContextOverflowError, match="holds 120"):
            engine.submit(_request(Message("user", "word " * 90)))


def test_a_model_without_a_tower_refuses_pictures_and_goes_on(tmp_path: Path) -> None:
    folder = _llama4_folder(tmp_path, vision=False)
    with open_engine(folder, EngineOptions(dtype="float32")) as engine:
        with pytest.raises(UsageError, match="reads no images"):
            engine.submit(_request(user_message("what?", [_picture((40, 40), "red")])))
        assert "".join(Reply(engine.submit(_request(Message("user", "what?"))))) is not None


def _folder_checkpoint(folder: Path) -> Checkpoint:
    save_folder(random_checkpoint(tiny_llama()), folder)
    return open_checkpoint(folder)


def test_templates_are_found_where_folders_keep_them(tmp_path: Path) -> None:
    checkpoint = _folder_checkpoint(tmp_path / "model")
    assert chat_template(checkpoint) is None
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "A"}), encoding="utf-8")
    assert chat_template(checkpoint) == "A"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert chat_template(checkpoint) == "D"
    (tmp_path / "model" / "chat_template.jinja").write_text("J", encoding="utf-8")
    assert chat_template(checkpoint) == "J"


def test_a_damaged_template_file_is_named(tmp_path: Path) -> None:
    checkpoint = _folder_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja"):
        chat_template(checkpoint)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    checkpoint = _folder_checkpoint(tmp_path / "model")
    (tmp_path / "secret").write_text('{"chat_template": "S"}', encoding="utf-8")
    (tmp_path / "model" / name).symlink_to("../secret")
    with pytest.raises(ModelFileError, match=f"{name}: is a link out of"):
        chat_template(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": [' + b"[]," * 200_000 + b"[]]}",
        b'{"chat_template": "A", "chat_template": "B"}',
        b'{"a": NaN}',
        b'{"a":' * 50_000,
        b"\xff",
    ],
    ids=["many values", "a key twice", "not finite", "deep", "no utf-8"],
)
def test_a_hostile_tokenizer_config_is_refused(tmp_path: Path, content: bytes) -> None:
    checkpoint = _folder_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json"):
        chat_template(checkpoint)


def test_a_list_of_templates_without_a_plain_name_is_no_template(tmp_path: Path) -> None:
    checkpoint = _folder_checkpoint(tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text('{"chat_template": [{"name": ["default"], "template": "T"}, 3]}', encoding="utf-8")
    assert chat_template(checkpoint) is None


def test_a_folder_with_tokenizer_json_and_template_answers(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "vocabulary")
    tokenizer = load_tokenizer(tmp_path / "vocabulary")
    config = dataclasses.replace(tiny_llama(), vocab_size=tokenizer.vocab_size)
    save_folder(random_checkpoint(config, seed=4), tmp_path / "model")
    config_json = (tmp_path / "model" / "config.json").read_bytes()
    folder = write_model_folder(tmp_path / "model")
    (folder / "config.json").write_bytes(config_json)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        encoding="utf-8",
    )
    with open_engine(folder, EngineOptions(dtype="float32")) as engine:
        reply = Reply(engine.submit(_request(Message("user", "hi"))))
        "".join(reply)
        assert reply.prompt_tokens > 3
