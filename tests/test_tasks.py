"""The shipped tasks of templates: written by tasks/make.py as they are, balanced, fair to the bigram table,
and with the answer that Python's own parser gives.
"""
import ast
import json
import os
import textwrap

import pytest

import prepare
from conftest import REPO, byte_tokenizer
from tasks import make
from tokenizer import save_tokenizer

FOLDER = os.path.join(REPO, "tasks")


def shipped(name):
    with open(os.path.join(FOLDER, name), encoding="utf-8") as f:
        return f.read()


TASKS = {name: json.loads(shipped(name)) for name in sorted(os.listdir(FOLDER)) if name.endswith(".json")}
TEMPLATES = {name: task for name, task in TASKS.items() if "prompts" in task}
FAMILIES = TASKS["quotes_hard.json"]["families"]


def test_the_shipped_files_are_what_make_writes(tmp_path, monkeypatch, capsys):
    """To the byte; and no file with prompts is without a generator."""
    monkeypatch.setattr(make, "FOLDER", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["make.py"])
    make.main()
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert written == {name: shipped(name) for name in written}
    assert set(written) == {*TEMPLATES, "quotes_hard.json"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_many_different_and_balanced(name):
    """800 to choose and learn on, 240 held out, none of them twice; both answers equally often."""
    task, seen = TEMPLATES[name], []
    for part, number in (("prompts", 800), ("held_out", 240)):
        rights = [right for _, right, _ in task[part]]
        seen += [prompt for prompt, *_ in task[part]]
        assert len(rights) == number and rights.count(rights[0]) == number // 2
        assert all({right, other} == set(task["prompts"][0][1:]) for _, right, other in task[part])
    assert len(set(seen)) == len(seen)


def fits(prompt, answer):
    """Whether Python can read the prompt with this answer, however it may go on."""
    text = textwrap.dedent(prompt + answer)
    for more in ("", "\n", " x:\n  pass", " x: pass", "0: pass", "        pass", "  y", '"', "])"):
        for line in (text, text.replace("def ", "def f_", 1)):
            try:
                ast.parse(line + more)
            except SyntaxError:
                continue
            return True
    return False


@pytest.mark.parametrize("name", TEMPLATES)
def test_python_can_read_the_right_answer_and_not_the_other(name):
    """But for `if x in` and `while x in`, which are Python too, only seldom so."""
    for part in ("prompts", "held_out"):
        for prompt, right, other in TEMPLATES[name][part]:
            assert fits(prompt, right), prompt
            assert not fits(prompt, other) or (other == " in" and "for " not in prompt), prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_hard_inputs_have_the_answer_that_python_gives(name):
    """Sixteen, half for either quote; the string is open, and the other quote does not close it."""
    rights = [right for _, right, _ in FAMILIES[name]]
    assert len(rights) == 16 and rights.count("')\n") == rights.count('")\n') == 8
    assert len({prompt for prompt, *_ in FAMILIES[name]}) == 16
    for prompt, right, other in FAMILIES[name]:
        assert {right, other} == {"')\n", '")\n'}
        assert fits(prompt, right) and not fits(prompt, other), prompt


@pytest.fixture(scope="module")
def trained_tokenizer():
    """A BPE of 2,048 tokens, trained on a part of the standard library, as prepare.py does."""
    saved = dict(vars(prepare))
    try:
        prepare.configure(vars(prepare), ["--bpe_sample_bytes=12000000"])
        return prepare.train_bpe()
    finally:
        vars(prepare).update(saved)


def test_answers_are_single_tokens(trained_tokenizer):
    """Of a tokenizer like the quickstart's; and nearly all pairs end alike, whatever it was trained on."""
    found = list(make.complaints(trained_tokenizer))
    assert not [line for line in found if "single token" in line or "more than" in line], found[:3]
    assert len(found) < 0.05 * sum(make.PAIRS.values()) * len(TEMPLATES), found[:3]


def test_what_a_tokenizer_cannot_spell_in_one_token_is_said(tmp_path, monkeypatch, capsys):
    """`--tokenizer` names the first problem and writes nothing."""
    save_tokenizer(byte_tokenizer(256), tmp_path / "t.json")
    monkeypatch.setattr(make, "FOLDER", str(tmp_path))
    monkeypatch.setattr(make, "tokenizer", "")
    monkeypatch.setattr("sys.argv", ["make.py", f"--tokenizer={tmp_path / 't.json'}"])
    with pytest.raises(SystemExit):
        make.main()
    assert "is no single token" in capsys.readouterr().err and os.listdir(tmp_path) == ["t.json"]
