"""Files of every format, made here in the form of the published ones, and what is wrong in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergec.compiler.adaptation.data import Encoded, Encoder, Example, read_examples, split
from mergec.compiler.errors import CompileError


def written(tmp_path: Path, name: str, content: Any) -> Path:
    file = tmp_path / name
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


DIALOGUE = "Where is the key ? __eou__ On the shelf . __eou__ Thank you . __eou__"
SPOKEN = '{"dialog": ["Where is the key ? ", "On the shelf .", "Thank you ."], "act": [2, 1]}\n'
SCENES = '{"concept_set": "dog#run", "scene": ["A dog runs.", "Dogs run."]}\n'
TURNS = [
    ("Where is the key ?", "On the shelf ."),
    ("Where is the key ?\nOn the shelf .", "Thank you ."),
]
LOG = [
    {
        "text": "I need a hotel.",
        "metadata": {},
        "dialog_act": {"Hotel-Inform": [["Type", "hotel"]]},
    },
    {
        "text": "The Lodge is in the north. ",
        "metadata": {"hotel": {}},
        "dialog_act": {"Hotel-Inform": [["Name", "Lodge"], ["Area", "north"]], "general-bye": []},
    },
    {"text": "Book it.", "metadata": {}},
    {"text": "Done.", "metadata": {"hotel": {}}},
]
READ = [
    (
        "a.txt",
        "One line,\nand another.\n\n\nA second text.\n",
        [(None, "One line,\nand another."), (None, "A second text.")],
    ),
    (
        "a.jsonl",
        '{"prompt": "2+2", "answer": "4"}\n\n{"text": "abc"}\n',
        [("2+2", "4"), (None, "abc")],
    ),
    ("tokens.jsonl", '{"prompt": [3, 4], "answer": [5]}\n', [([3, 4], [5])]),
    ("commongen.train.jsonl", SCENES, [("dog run", "A dog runs."), ("dog run", "Dogs run.")]),
    (
        "cg.jsonl",
        '{"concept_set_idx": 0, "concepts": ["ski", "hill"], "target": "I ski."}\n',
        [("ski hill", "I ski.")],
    ),
    ("dialogues_text.txt", f"{DIALOGUE}\n", TURNS),
    ("daily.jsonl", SPOKEN, TURNS),
    (
        "data.json",
        {"SNG01.json": {"goal": {}, "log": LOG}},
        [
            ("Hotel-Inform(Name=Lodge; Area=north) general-bye()", "The Lodge is in the north."),
            ("Book it.", "Done."),
        ],
    ),
    (
        "dialogues_001.json",
        [
            {
                "dialogue_id": "1",
                "turns": [
                    {"speaker": "USER", "utterance": "Hello."},
                    {"speaker": "SYSTEM", "utterance": "Hi, what is it?"},
                ],
            }
        ],
        [("Hello.", "Hi, what is it?")],
    ),
]


@pytest.mark.parametrize(("name", "content", "wanted"), READ, ids=[name for name, *_ in READ])
def test_formats_are_recognized(name: str, content: Any, wanted: Any, tmp_path: Path) -> None:
    found = read_examples(written(tmp_path, name, content))
    assert [(example.prompt, example.answer) for example in found] == wanted


@pytest.mark.parametrize(
    ("form", "content", "said"),
    [
        (
            "jsonl",
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n',
            'line 2: expected {"prompt"',
        ),
        ("jsonl", '{"text": ""}\n', "line 1: expected"),
        ("jsonl", '{"text": ["a"]}\n', "line 1: expected"),
        ("jsonl", '\n{"text": "a"\n', "line 2: expected"),
        ("jsonl", "[1]\n", "line 1: expected"),
        ("commongen", '{"concepts": ["a"], "target": ""}\n', 'line 1: expected {"concept_set"'),
        ("commongen", '{"concepts": "", "target": "x"}\n', "line 1: expected"),
        ("dailydialog", "a __eou__ b __eou__\nno end\n", "line 2: expected utterances that end"),
        ("dailydialog", "only one __eou__\n", "line 1: expected utterances that end"),
        ("dailydialog", '{"dialog": "a"}\n', "line 1: expected"),
        ("multiwoz", '{"a": {"log": []},\n "b"}', "line 2: not JSON"),
        ("multiwoz", '{"a": {"goal": {}}}', "a: expected dialogues"),
        ("multiwoz", '{"a": {"log": [{"text": "x"}, {"said": "y"}]}}', "a, turn 1: expected dial"),
        ("multiwoz", "3", "expected dialogues"),
        ("text", "\n\n", "holds no examples; expected paragraphs"),
        ("text", b"good\nbad \xff\n", "line 2: not UTF-8"),
    ],
)
def test_bad_files_give_one_line(form: str, content: Any, said: str, tmp_path: Path) -> None:
    file = written(tmp_path, "bad", content)
    with pytest.raises(CompileError) as caught:
        read_examples(file, form)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"none.txt cannot be read \(No such file"):
        read_examples(tmp_path / "none.txt")


class Letters:
    """A tokenizer of letters, with a beginning and an end."""

    eos_token_id = 1
    chat_template = ""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(letter) - 87 for letter in text]}


def encoded(*examples: Example, length: int = 8, **options: Any) -> list[Encoded]:
    return Encoder(Letters(), 40, length, "z", file="here.txt", **options)(examples)


def test_prompts_and_answers_become_tokens() -> None:
    (found,) = encoded(Example("cd", "ab"))
    assert found == Encoded((0, 10, 11, 35, 12, 13, 1), 4)
    assert (found.prompt, found.answer) == ((0, 10, 11, 35), (12, 13, 1))


def test_what_is_too_long_is_cut() -> None:
    (found,) = encoded(Example("cd", "abababab"))
    assert found == Encoded((11, 10, 11, 35, 12, 13, 1)[-8:], 4) or found.tokens[-3:] == (12, 13, 1)
    assert len(found.tokens) == 8
    (found,) = encoded(Example("abcdabcdabcd", "a"))
    assert len(found.tokens) == 8
    assert found.start == 1, "one token of the prompt stays"
    pieces = encoded(Example("abcdabcdabcd"))
    assert [piece.tokens for piece in pieces] == [
        (0, 10, 11, 12, 13, 10, 11, 12),
        (13, 10, 11, 12, 13, 1),
    ]
    assert pieces[0].prompt == (0, 10, 11, 12)
    assert {piece.start for piece in pieces} == {1}


def test_tokens_that_the_model_does_not_know() -> None:
    with pytest.raises(CompileError, match=r"here.txt, line 7: the token 40 is not in the vocabu"):
        encoded(Example([3, 40], line=7))
    with pytest.raises(CompileError, match=r"line 2: the model has no tokenizer; give token numb"):
        Encoder(None, 40, 8, file="here.txt")([Example("a", line=2)])
    assert Encoder(None, 40, 8)([Example([5], [3, 4])]) == [Encoded((3, 4, 5), 2)]
    with pytest.raises(CompileError, match=r"no chat template"):
        encoded(chat=True)


def test_a_share_is_kept_for_validation() -> None:
    dialogues = [Example(f"{line}", line=line) for line in range(1, 21) for _ in range(3)]
    learned, held = split(dialogues, 0.1, seed=3)
    assert len(held) == 6
    assert len(learned) == 54
    assert not {example.line for example in held} & {example.line for example in learned}
    assert split(dialogues, 0.1, seed=3) == (learned, held)
    assert split(dialogues, 0.1, seed=4) != (learned, held)
    assert len(split(dialogues, 0.0, seed=0)[1]) == 3, "at least one line"
    with pytest.raises(CompileError, match=r"one example; give at least two"):
        split(dialogues[:3], 0.5, seed=0)
