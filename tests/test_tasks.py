"""The shipped tasks of templates: written by tasks/make.py as they are, balanced, fair to the bigram table,
and with the answer that Python's own parser gives. And the contexts that are made of a task.
"""
import ast
import json
import os
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare
from circuits import tasks
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


# ----------------------------------------------------------------------------------------------------------
# contexts

T = 4  # the window of the model, of whose data only this is asked


def source(**settings):
    """A Source of random text in few letters: only train has an a, only val a b."""
    rng = np.random.default_rng(0)
    train, val = (rng.choice(np.frombuffer(letters, "u1"), size=4000).astype("<u2")
                  for letters in (b"acrt", b"bcrt"))
    model = SimpleNamespace(config=SimpleNamespace(block_size=T))
    return tasks.Source(SimpleNamespace(
        model=model, data=SimpleNamespace(train=train, val=val), tokenizer=byte_tokenizer(256),
        process=SimpleNamespace(device=torch.device("cpu"))), **settings)


def natural(pair, contains=""):
    return {"pair": [ord(c) for c in pair], "contains": contains, "beyond": [], "path": "t.json"}


@pytest.mark.parametrize("pair", ["tr", "rt"])
@pytest.mark.parametrize("contains", ["", "r"])
def test_contexts_are_what_stands_before_an_answer(pair, contains):
    """At places drawn from all of the text; either answer as often, at most as many as asked for, and what a
    context contains stands in it, not after it."""
    made = source()
    train, spec = made.loaded.data.train, natural(pair, contains)
    found = made.of_text(train, "train", spec, 100)
    assert len(found) == 100 and found.sides().sum() == 0 and found.last.tolist() == [T - 1] * 100
    for text, (right, other), at in zip(found.idx.tolist(), found.answers.tolist(), found.positions.tolist(),
                                        strict=True):
        assert text == train[at - T:at].tolist() and [right, other] in (spec["pair"], spec["pair"][::-1])
        assert right == train[at] and contains.encode() in bytes(text)
    assert len(set(found.positions.tolist())) == 100 and found.positions.max() > len(train) / 2
    groups = tasks.contexts_record(found, spec["pair"])["positions"]
    assert [{int(train[at]) for at in group} for group in groups] == [{c} for c in spec["pair"]]


def texts(contexts):
    return {bytes(text) for text in contexts.idx.tolist()}


def test_three_sets_share_no_place():
    """To learn on and to choose by are of train, to judge by of val; each answer is as often in each. Of few
    contexts a third is to choose by."""
    made = source(learning=200, choosing=60, judging=80)
    learning, choosing, judging = sets = made.three_sets(natural("rt"))
    assert [(len(part), int(part.sides().sum())) for part in sets] == [(200, 0), (60, 0), (80, 0)]
    assert not {*learning.positions.tolist()} & {*choosing.positions.tolist()}
    for part, data in ((learning, made.loaded.data.train), (choosing, made.loaded.data.train),
                       (judging, made.loaded.data.val)):
        assert part.idx.tolist() == [data[at - T:at].tolist() for at in part.positions.tolist()]
    few = source(learning=30, choosing=60).three_sets(natural("rt"))
    assert [(len(part), int(part.sides().sum())) for part in few[:2]] == [(60, 0), (30, 0)]


def prompts_of(letter, number, longest=T):
    """Prompts of 2 to `longest` tokens; the right answer is 5 in half of them, in blocks."""
    return [([256, ord(letter), *[i % 7] * (longest - 2)][:2 + i % (longest - 1)],
             [5, 6][::-1 if i % 8 < 4 else 1]) for i in range(number)]


def test_prompts_end_where_they_end():
    """However they are filled up, and they may fill the window; half of them have either answer."""
    made, prompts = source(), prompts_of("a", 60)
    found = made.of_prompts([*prompts, *[([256, 97], [5, 6])] * 9], "prompts")
    rows = [(text[:last + 1], answers) for text, last, answers in zip(
        found.idx.tolist(), found.last.tolist(), found.answers.tolist(), strict=True)]
    assert found.sides().sum() == 0
    assert 60 <= len(rows) <= 69 and {len(ids) for ids, _ in rows} == {2, 3, 4}
    assert all(row in prompts or row == ([256, 97], [5, 6]) for row in rows)
    record = tasks.contexts_record(found, None)
    recorded = [pair for ids, answers in zip(record["ids"], record["answers"], strict=True)
                for pair in zip(ids, answers, strict=True)]
    assert sorted(recorded) == sorted(rows)
    assert {tuple(answers) for answers in record["answers"][0]} == {(5, 6)}
    families = tasks.prompts_record({"a family": found})
    assert families == {"a family": [[ids, *answers] for ids, answers in rows]}
    with pytest.raises(ValueError, match="window of 4"):
        made.of_prompts(prompts_of("a", 60, longest=T + 1), "prompts")


def test_inputs_beyond_are_made_of_what_the_task_names(tmp_path):
    """Of files beside that of the task; hard ones by families; of unseen data only for a natural task.
    What a task of prompts is judged by are those held out."""
    made = source(judging=40)
    (tmp_path / "other.json").write_text('{"answers": ["r", "c"]}')
    hard = [["x" * (1 + i % 3), *"rt"[::-1 if i % 2 else 1]] for i in range(20)]
    (tmp_path / "hard.json").write_text(json.dumps({"families": {"short": hard}}))
    spec = natural("rt") | {"beyond": ["other", "hard"], "path": str(tmp_path / "t.json")}
    judging = made.judging_set(spec)
    unseen = SimpleNamespace(val=made.loaded.data.train)
    found, families = made.beyond(spec, judging, unseen)
    assert list(found) == ["random order", "other", "hard: short", "unseen files", "ordinary text"]
    assert list(families) == ["hard: short"] and len(families["hard: short"]) == 20
    assert texts(found["random order"]) != texts(judging) == texts(made.judging_set(spec))
    assert found["random order"].idx.sort(1).values.tolist() == judging.idx.sort(1).values.tolist()
    assert found["other"].answers.unique().tolist() == [ord("c"), ord("r")]
    assert any(b"a" in text for text in texts(found["unseen files"]))
    assert not any(b"a" in text for text in texts(found["ordinary text"]))
    assert len(found["ordinary text"]) == len(found["unseen files"]) == 40
    prompted = {"prompts": prompts_of("x", 60), "held_out": prompts_of("y", 40), "beyond": [], "path": ""}
    learning, choosing, judging = made.three_sets(prompted)
    assert [{text[1] for text in part.idx.tolist()} for part in (learning, choosing, judging)] == [
        {ord("x")}, {ord("x")}, {ord("y")}]
    assert [int(part.sides().sum()) for part in (learning, choosing, judging)] == [0, 0, 0]
    assert list(made.beyond(prompted, judging, unseen)[0]) == ["random order", "ordinary text"]
