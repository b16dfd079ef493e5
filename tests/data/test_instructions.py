"""Instruction files -> tokens: which records are taken, what is learned of them, and what each mistake is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from qat_plugin.data.answers import encode_conversation
from qat_plugin.data.conversations import Conversations, Turn
from qat_plugin.data.instructions import InstructionData
from qat_plugin.data.packing import IGNORED
from qat_plugin.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }};{% endgeneration %}"
    "{% else %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
)
REWRITES = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.role }}:{{ m.content }};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
CHAT = (Turn("user", "Why?"), Turn("assistant", "Because."), Turn("user", "Really?"), Turn("assistant", "Yes."))


def tokenizer(template: str | None = None) -> Any:
    """One token a byte; <s> is 0, </s> is 1, and the two marks of ChatML are tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    base = Tokenizer(models.BPE(vocabulary, []))
    base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    made = tf.PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def write(folder: Path, *records: Any, name: str = "data.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return file


def learned(made: Any, turns: tuple[Turn, ...], **options: Any) -> tuple[str, str]:
    """The whole text, and what of it is learned."""
    ids, labels = encode_conversation(turns, made, **({"answers_only": True, "where": "data line 1"} | options))
    assert ids.dtype == labels.dtype == torch.int64 and ids.shape == labels.shape
    take = labels != IGNORED
    assert torch.equal(ids[take], labels[take])
    return made.decode(ids), made.decode(labels[take])


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": [{"role": "User", "content": "a"}, {"role": "assistant", "content": "b"}]}, ("user", "a", "b")),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ("user", "a", "b")),
        ({"instruction": "a", "input": "", "output": "b"}, ("user", "a", "b")),
        ({"instruction": "a", "output": "b"}, ("user", "a", "b")),
        ({"instruction": "a", "input": "c", "output": "b"}, ("user", "a\n\nc", "b")),
        ({"prompt": "a", "completion": "b"}, ("user", "a", "b")),
    ],
)
def test_each_form_of_record_is_read(tmp_path: Path, record: dict[str, Any], turns: tuple[str, str, str]) -> None:
    role, question, answer = turns
    expected = (Turn(role, question), Turn("assistant", answer))
    lines = Conversations.read(write(tmp_path, record, "", record))
    array = Conversations.read(write(tmp_path, json.dumps([record, record]), name="data.json"))
    assert lines.items == array.items == (expected, expected)
    assert lines.fingerprint == array.fingerprint, "the fingerprint is of the contents, not of the form"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{not json", r"line 2 is not JSON: .* at column 2; a record is"),
        ("[1]", "line 2 is a JSON list, not an object"),
        ({"text": "a"}, "line 2 has the keys 'text'; a record is"),
        ({"messages": []}, "line 2: the messages are an empty list, a list of turns is needed"),
        ({"messages": [{"role": "user"}]}, "line 2, message 1: an object with strings 'role' and 'content'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "line 2, message 1: role 'robot' is not one of system,"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2 has no answer"),
        ({"instruction": "a", "output": "  "}, "line 2 has no answer"),
        ({"instruction": "a"}, "line 2: 'output' is missing, a string is needed"),
        ({"prompt": "a", "completion": 3}, "line 2: 'completion' is int, a string is needed"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, record: Any, message: str) -> None:
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=message):
        Conversations.read(write(tmp_path, good, record))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        Conversations.read(write(tmp_path, "\n\n"))
    with pytest.raises(DataError, match="a JSON dict, an array of records is needed"):
        Conversations.read(write(tmp_path, '{"a": 1}', name="a.json"))
    with pytest.raises(DataError, match="is not JSON: .* at line 2; with one record a line, call it .jsonl"):
        Conversations.read(write(tmp_path, '{"a": 1}\n{"a": 2}', name="b.json"))
    with pytest.raises(DataError, match="nowhere.jsonl"):
        Conversations.read(tmp_path / "nowhere.jsonl")


def test_without_a_template_answers_and_the_end_of_text_are_learned() -> None:
    text, answers = learned(tokenizer(), CHAT)
    assert answers == "Because.</s>Yes.</s>"
    assert text.startswith("<s>Below is an instruction")
    assert "### Instruction:\nWhy?\n\n### Response:\nBecause.</s>\n\n### Instruction:\nReally?" in text


def test_a_system_turn_takes_the_place_of_the_preamble() -> None:
    text, answers = learned(tokenizer(), (Turn("system", "Be brief."), *CHAT[:2]))
    assert text.startswith("<s>### System:\nBe brief.\n\n### Instruction:") and answers == "Because.</s>"


@pytest.mark.parametrize(
    ("template", "answers"),
    [(CHATML, "Because.<|im_end|>\nYes.<|im_end|>\n"), (MARKED, "Because.;Yes.;")],
    ids=["prefixes", "generation marks"],
)
def test_with_a_template_the_text_is_its_own(template: str, answers: str) -> None:
    made = tokenizer(template)
    text, found = learned(made, CHAT)
    messages = [{"role": turn.role, "content": turn.content} for turn in CHAT]
    assert text == made.apply_chat_template(messages, tokenize=False)
    assert found == answers


def test_everything_is_learned_when_asked() -> None:
    for template in (None, CHATML):
        text, found = learned(tokenizer(template), CHAT, answers_only=False)
        assert text == found


def test_a_template_that_rewrites_history_is_refused() -> None:
    with pytest.raises(DataError, match=r"data line 1: .*changes earlier turns.*data.answers_only=false"):
        learned(tokenizer(REWRITES), CHAT)
    assert learned(tokenizer(REWRITES), CHAT[:2])[1] == "Because.;", "with one answer nothing is rewritten"


def test_a_template_that_refuses_says_why_and_where() -> None:
    with pytest.raises(DataError, match="data line 1: the tokenizer's chat template does not .*no system role here"):
        learned(tokenizer(NO_SYSTEM), (Turn("system", "Be brief."), *CHAT))


def records(*lengths: int) -> list[dict[str, str]]:
    return [{"prompt": f"p{number}", "completion": "x" * length} for number, length in enumerate(lengths)]


def data(folder: Path, *lengths: int, **options: Any) -> InstructionData:
    settings = {"sequence_length": 160, "batch_size": 2, "valid_fraction": 0.25, "progress": False} | options
    return InstructionData(tokenizer(CHATML), write(folder, *records(*lengths)), **settings)


def test_batches_are_packed_and_the_end_is_held_out(tmp_path: Path) -> None:
    made = data(tmp_path, *range(10, 18))
    batches = [*made.train_dataloader(), *made.val_dataloader()]
    assert all(set(batch) == {"input_ids", "labels", "position_ids"} for batch in batches)
    assert all(batch["input_ids"].shape[1] == 160 for batch in batches)
    text = made.tokenizer.decode(torch.cat([batch["input_ids"].flatten() for batch in made.val_dataloader()]))
    assert "p6" in text and "p7" in text and "p5" not in text
    again = data(tmp_path, *range(10, 18))
    assert made.fingerprint == again.fingerprint != data(tmp_path, *range(9, 17)).fingerprint


def test_without_packing_examples_come_one_by_one(tmp_path: Path) -> None:
    made = data(tmp_path, 5, 9, 7, 6, packing=False, batch_size=3)
    (batch,) = made.train_dataloader()
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    longest = batch["attention_mask"].sum(1).max()
    assert batch["input_ids"].shape == (3, longest)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_an_example_that_is_too_long_is_never_lost_in_silence(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"1 of 3 examples are longer than sequence_length=64 and go on in another.*the prompt"
    ):
        data(tmp_path, 90, 5, 6, 7, sequence_length=64).setup()
    long = {"prompt": "p" * 90, "completion": "never seen"}
    file = write(tmp_path, long, *records(5, 6, 7), name="long.jsonl")
    settings: dict[str, Any] = {"sequence_length": 64, "packing": False, "valid_fraction": 0.25, "progress": False}
    made = InstructionData(tokenizer(CHATML), file, batch_size=2, **settings)
    with pytest.warns(UserWarning, match="1 of them lose their whole answer and are left out"):
        made.setup()
    assert len(made.train_dataloader().dataset) == 2  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no example has a token to learn within sequence_length=8"):
        data(tmp_path, 5, 6, 7, sequence_length=8, packing=False).setup()


def test_one_line_says_what_was_made_of_the_file(tmp_path: Path) -> None:
    said = data(tmp_path, *range(10, 30)).summary
    assert f"{tmp_path / 'data.jsonl'}: 15 examples of" in said and "in answers) to train on" in said
    assert (
        "held out 5 examples of" in said and "(the last 25% of the file)" in said and said.endswith("; chat template")
    )


def test_numbers_out_of_range_are_refused_at_once(tmp_path: Path) -> None:
    for name, value in (("sequence_length", 1), ("batch_size", 0), ("num_workers", -1), ("eval_tokens", 0)):
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            data(tmp_path, 5, 6, **{name: value})
    with pytest.raises(ConfigError, match="valid_fraction is 1.0"):
        data(tmp_path, 5, 6, valid_fraction=1.0)
    with pytest.raises(DataError, match="has 1 record: holding out 25%"):
        data(tmp_path, 5).setup()


def test_the_order_of_an_epoch_is_a_function_of_the_seed(tmp_path: Path) -> None:
    def visited(seed: int) -> list[list[int]]:
        made = data(tmp_path, *range(10, 40), sequence_length=64, seed=seed)
        return [row for batch in made.train_dataloader() for row in batch["input_ids"].tolist()]

    assert visited(0) == visited(0)
    assert visited(0) != visited(1)
