"""prepare.py: every document comes back from the bins unchanged, the split depends on nothing but the
document, all sources and formats are read, and whatever goes wrong leaves the data folder as it was.
"""
import gzip
import hashlib
import io
import itertools
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import prepare
from conftest import byte_tokenizer, tree
from documents import files_of, say_once, split_text
from tokenizer import load_tokenizer, save_tokenizer

# with val_fraction 0.5 these are on both sides, whatever else is in the corpus
TEXTS = [f"def f{i}(x):\n    return x + {i}  # number {i}\n" for i in range(24)]


def run_prepare(data_dir, *arguments):
    """Run prepare.py's main in this process and return the folder it wrote; put its settings back."""
    saved = dict(vars(prepare))
    try:
        usual = [f"--data_dir={data_dir}", "--name=d", "--tokenizer=bytes", "--val_fraction=0.5"]
        prepare.main([*usual, *arguments])
    finally:
        vars(prepare).update(saved)
    return Path(data_dir) / "d"


def write_jsonl(path, rows):
    """Write rows as JSON, and strings as they are, one per line."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def corpus(folder, texts=TEXTS, name="texts.jsonl"):
    folder.mkdir(exist_ok=True)
    return write_jsonl(folder / name, [{"text": text, "n": i} for i, text in enumerate(texts)])


def parts(folder):
    """The documents of train.bin and of val.bin, decoded with what is in the folder and nothing else."""
    encoding = load_tokenizer(folder / "tokenizer.json")
    documents = []
    for part in ("train", "val"):
        ids = np.fromfile(folder / f"{part}.bin", dtype="<u2")
        assert ids[-1] == encoding.eot_token, "a bin ends with <|endoftext|>"
        ends = np.flatnonzero(ids == encoding.eot_token)
        documents.append([encoding.decode(piece[piece != encoding.eot_token].tolist(), errors="strict")
                          for piece in np.split(ids, ends + 1)[:-1]])
    return documents


def bins(folder):
    """What has to be the same whenever the input is; meta.json has the date in it."""
    return {name: (folder / name).read_bytes() for name in ("train.bin", "val.bin", "tokenizer.json")}


# ----------------------------------------------------------------------------------------------------------
# documents, tokens and the split


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@hypothesis_settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
                              min_size=1)))
def test_any_text_survives_the_round_trip_through_bins_and_tokenizer(tokenizer, texts):
    """Decoding the bins with tokenizer.json alone gives every document back, in order, in one of the
    bins."""
    with tempfile.TemporaryDirectory() as tmp:
        path = corpus(Path(tmp), texts + TEXTS)
        arguments = (f"--dataset={path}", f"--tokenizer={tokenizer}", "--vocab_size=270")
        train, val = parts(run_prepare(f"{tmp}/data", *arguments))
    held_out = [text for text in texts + TEXTS if prepare.is_held_out(text.encode(), 0.5)]
    assert val == held_out
    assert train == [text for text in texts + TEXTS if text not in held_out]


def test_the_same_input_gives_the_same_bytes_on_any_number_of_cores(tmp_path, monkeypatch):
    """Two runs agree in bins and tokenizer, with one thread and with five."""
    path = corpus(tmp_path)
    arguments = (f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=280")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    first = bins(run_prepare(tmp_path / "one", *arguments))
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert bins(run_prepare(tmp_path / "two", *arguments)) == first


def test_a_trained_tokenizer_has_vocab_size_tokens_the_last_being_endoftext(tmp_path):
    """257 is bytes only, 280 has 23 merges; meta.json, encoding and <|endoftext|> agree on the number."""
    path = corpus(tmp_path, [*TEXTS, " " * 2_000_000])  # more spaces than a regular expression can take
    for size in (257, 280):
        folder = run_prepare(tmp_path, f"--dataset={path}", "--tokenizer=bpe", f"--vocab_size={size}")
        encoding = load_tokenizer(folder / "tokenizer.json")
        assert encoding.n_vocab == json.loads((folder / "meta.json").read_text())["vocab_size"] == size
        assert encoding.eot_token == size - 1 and len(encoding.token_byte_values()) == size - 1


def test_the_trained_tokenizer_sees_training_documents_only(tmp_path):
    """Changing a held-out document leaves the tokenizer as it was; changing a training document does not."""
    candidates = [f"zq{i} " * 50 for i in range(99)]
    held_out = next(text for text in candidates if prepare.is_held_out(text.encode(), 0.5))
    trained_on = next(text for text in candidates if not prepare.is_held_out(text.encode(), 0.5))
    tokenizers = []
    for i, texts in enumerate((TEXTS, [held_out, *TEXTS], [trained_on, *TEXTS])):
        path = corpus(tmp_path, texts)
        folder = run_prepare(tmp_path / str(i), f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=280")
        tokenizers.append((folder / "tokenizer.json").read_bytes())
    assert tokenizers[0] == tokenizers[1] != tokenizers[2]


def test_text_that_spells_endoftext_stays_text(tmp_path):
    """There are as many <|endoftext|> ids as documents, even if a document contains those very
    characters."""
    texts = [text + "<|endoftext|>" for text in TEXTS]
    folder = run_prepare(tmp_path, f"--dataset={corpus(tmp_path, texts)}")
    train, val = parts(folder)
    assert sorted(train + val) == sorted(texts)


def test_meta_counts_what_is_in_the_bins(tmp_path):
    """Tokens are half the file's bytes, bytes are the text's, and the digests are those of the files."""
    path = corpus(tmp_path, [*TEXTS, "naïve 🎉"])
    folder = run_prepare(tmp_path, f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=280")
    meta = json.loads((folder / "meta.json").read_text())
    for part, documents in zip(("train", "val"), parts(folder)):
        tokens = (folder / f"{part}.bin").stat().st_size // 2
        assert meta[part] == {"tokens": tokens, "documents": len(documents),
                              "bytes": sum(len(text.encode()) for text in documents),
                              "sha256": hashlib.sha256((folder / f"{part}.bin").read_bytes()).hexdigest()}
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert meta["tokenizer_sha256"] == digest


def test_a_text_is_split_at_its_separator(tmp_path):
    """A .txt with <|endoftext|> between its documents holds several; --separator names another, or none."""
    path = tmp_path / "texts.txt"
    path.write_text("\n<|endoftext|>\n".join(TEXTS) + "<|endoftext|>\n")
    train, val = parts(run_prepare(tmp_path, f"--dataset={path}"))
    assert sorted(train + val) == sorted(text.strip() for text in TEXTS) and train and val
    train, val = parts(run_prepare(tmp_path, f"--dataset={path}", "--separator="))
    assert train[0] + val[0] == path.read_text()
    path.write_text("\n\n".join(TEXTS))
    train, val = parts(run_prepare(tmp_path, f"--dataset={path}", "--separator=\n\n"))
    assert sorted(train + val) == sorted(text.strip() for text in TEXTS)


@pytest.mark.parametrize("flags", [["--tokenizer=bytes"], ["--tokenizer=bpe", "--vocab_size=270"],
                                   ["--max_tokens=1"]], ids=str)
def test_of_an_only_document_the_tail_is_held_out(tmp_path, flags):
    """A single text is split into its beginning, which is trained on, and its last val_fraction."""
    path = tmp_path / "one.txt"
    path.write_text(text := "".join(TEXTS) + "é")
    train, val = parts(run_prepare(tmp_path, f"--dataset={path}", "--val_fraction=0.1", *flags))
    assert train == [text[:-len(val[0])]] and val == [text[-(len(text) // 10):]]


def test_validation_documents_do_not_depend_on_order_and_are_not_trained_on(tmp_path):
    """The same documents, reversed and some of them twice, are split the same way."""
    train, val = parts(run_prepare(tmp_path / "a", f"--dataset={corpus(tmp_path)}"))
    again = corpus(tmp_path, TEXTS[::-1] + TEXTS[:9])
    train_again, val_again = parts(run_prepare(tmp_path / "b", f"--dataset={again}"))
    assert set(train) == set(train_again) and set(val) == set(val_again)
    assert not set(train) & set(val)


def test_val_fraction_is_kept_on_average():
    """Of 20,000 documents one in a hundred is held out, give or take four standard deviations."""
    held_out = sum(prepare.is_held_out(str(i).encode(), 0.01) for i in range(20_000))
    assert abs(held_out - 200) < 4 * 14


def test_max_tokens_gives_a_beginning_of_the_whole(tmp_path):
    """The limited train.bin is the shortest run of whole documents, from the start, of max_tokens."""
    path = corpus(tmp_path)
    whole = np.fromfile(run_prepare(tmp_path / "whole", f"--dataset={path}") / "train.bin", dtype="<u2")
    ends = np.flatnonzero(whole == 256) + 1
    for limit in (100, ends[4]):
        folder = run_prepare(tmp_path / "some", f"--dataset={path}", f"--max_tokens={limit}")
        some = np.fromfile(folder / "train.bin", dtype="<u2")
        assert len(some) == ends[ends >= limit][0]
        assert np.array_equal(some, whole[:len(some)])


def test_the_largest_vocabulary_that_fits_uint16_is_stored_exactly(tmp_path):
    """With 65,536 tokens the last id is 65,535, and documents end with it; one more is an error."""
    save_tokenizer(byte_tokenizer(65_535), tmp_path / "tokenizer.json")
    folder = run_prepare(tmp_path, f"--dataset={corpus(tmp_path)}", f"--tokenizer={tmp_path}/tokenizer.json")
    train, val = parts(folder)
    assert sorted(train + val) == sorted(TEXTS)
    assert np.fromfile(folder / "val.bin", dtype="<u2").max() == 65_535


# ----------------------------------------------------------------------------------------------------------
# sources


def test_local_files_of_every_format_are_read_in_order_of_their_paths(tmp_path):
    """Texts are documents, rows of .jsonl and .parquet are; each as .gz too, in nested folders."""
    import pyarrow.parquet
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    names = ["a.txt", "b.py", "c.jsonl", "d.parquet", "e.txt.gz", "f.py.gz", "g.jsonl.gz", "h.parquet.gz",
             "i.md"]
    expected = []
    for i, name in enumerate(names):
        path = deep / name.removesuffix(".gz")
        texts = [f"{name} {k}: é\r\n" for k in range(2 if name[0] in "cdgh" else 1)]
        expected += texts
        if ".jsonl" in name:
            write_jsonl(path, [{"body": text} for text in texts])
        elif ".parquet" in name:
            pyarrow.parquet.write_table(pyarrow.table({"n": [i] * len(texts), "body": texts}), path)
        else:
            path.write_bytes(texts[0].encode())
        if name.endswith(".gz"):
            (deep / name).write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    folder = run_prepare(tmp_path, f"--dataset={tmp_path}/a/**/*", "--text_column=body")
    train, val = parts(folder)
    assert train == [t for t in expected if t not in val] and val == [t for t in expected if t not in train]


@pytest.mark.parametrize("dataset", ["a [b]/x.txt", "a [b]/*.txt", "a ?b?/[x].txt", "**/x.txt"])
def test_brackets_in_names(tmp_path, monkeypatch, dataset):
    """A path with a bracket is first taken as it is, only then as a pattern."""
    (tmp_path / "a [b]").mkdir()
    (tmp_path / "a [b]" / "x.txt").write_text("<|endoftext|>".join(TEXTS))
    monkeypatch.chdir(tmp_path)
    train, val = parts(run_prepare(tmp_path, f"--dataset={dataset}"))
    assert len(train + val) == len(TEXTS)


def test_a_large_text_is_split_as_it_is_read():
    """The first document of a .txt comes out before the second megabyte is asked for; and no separator is
    missed where two readings meet."""
    class Text(io.BytesIO):
        def read(self, size=-1):
            assert size > 0, "all of the file was asked for"
            return super().read(size)
    file = Text(b"first<|endoftext|>" + b"x" * 5_000_000)
    assert next(split_text(file, "<|endoftext|>")) == b"first" and file.tell() <= 2**20
    for shift in range(15):
        pieces = [b"a" * (2**20 - shift), b"b" * (2**20 - shift), b"c"]
        file = Text(b"<|endoftext|>".join(pieces))
        assert list(split_text(file, "<|endoftext|>")) == pieces


@pytest.mark.parametrize("separator, occurs", [
    (r"\n\n", True), ("\n\n", True), (r"\t", False), ("%%", False)])
def test_a_separator_is_read_as_it_is_written_on_a_command_line(tmp_path, capsys, separator, occurs):
    """Escapes are understood; one that never occurs is said, once."""
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"{i}\ntwo\n\nthree {i}\n")
    say_once.cache_clear()
    train, val = parts(run_prepare(tmp_path, f"--dataset={tmp_path}/*.txt", f"--separator={separator}"))
    said = capsys.readouterr().out.count(f"a .txt without separator={separator!r} in it is one document")
    assert said == (not occurs)
    assert sorted(train + val) == sorted(text for i in range(12) for text in (
        (f"{i}\ntwo", f"three {i}") if occurs else (f"{i}\ntwo\n\nthree {i}\n",)))


def test_links_between_folders_count_a_file_once(tmp_path, monkeypatch):
    """** goes into each real folder once, links to other places too, and ends where links go round."""
    for folder in ("lib/deep", "elsewhere", ".hidden"):
        (tmp_path / "text" / folder).mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in ("lib/a.txt", "lib/deep/b.txt", "c.txt", ".hidden/no.txt", "../outside/d.txt"):
        (tmp_path / "text" / path).write_text(path)
    (tmp_path / "text" / "lib64").symlink_to("lib")
    (tmp_path / "text" / "lib" / "up").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "lib" / "deep" / "up").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "far").symlink_to(outside)
    (tmp_path / "text" / "same.txt").symlink_to("c.txt")
    monkeypatch.chdir(tmp_path / "text")
    names = ["c.txt", "far/d.txt", "lib/a.txt", "lib/deep/b.txt"]
    assert files_of("**/*.txt") == files_of("**") == names
    assert files_of(f"{tmp_path}/t*/**/*.txt") == [f"{tmp_path}/text/{name}" for name in names]
    assert "lib/deep/b.txt" in files_of("**/deep/**/*.txt")
    assert files_of("lib/*.txt") == ["lib/a.txt"] and files_of("**/none") == []


@pytest.mark.parametrize("name", ["x.txt", "x.py", "x.txt.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    """It may begin a file, and is left out; within a row it is a character like any other."""
    text = "\ufeff" + "".join(TEXTS)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    train, val = parts(run_prepare(tmp_path, f"--dataset={tmp_path}/{name}"))
    assert train[0] + val[0] == text[1:]
    train, val = parts(run_prepare(tmp_path, f"--dataset={corpus(tmp_path, [text])}"))
    assert train[0] + val[0] == text


def test_the_standard_library_is_the_default(tmp_path):
    """Without arguments the documents are the .py files of the running Python, not what was installed."""
    assert prepare.dataset == "python_stdlib"
    paths = prepare.local_files()
    assert paths == sorted(paths) and len(paths) > 500 and not any("site-packages" in path for path in paths)
    train, _ = parts(run_prepare(tmp_path, "--max_tokens=100000"))
    files = (Path(path).read_bytes() for path in paths)
    assert train[0].encode() == next(data for data in files if data and not prepare.is_held_out(data, 0.5))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hugging_face_datasets_are_streamed(tmp_path, monkeypatch, kind):
    """Rows go through `datasets` in streaming mode, training and validation from their own splits."""
    import datasets
    folder, calls, load = tmp_path / "copy", [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: calls.append(kw) or load(*a, **kw))
    for part, texts in (("train", TEXTS[:20]), ("test", TEXTS[20:])):
        path = corpus(folder, texts, f"{part}.jsonl")
        if kind == "parquet":
            datasets.Dataset.from_json(str(path), cache_dir=tmp_path).to_parquet(folder / f"{part}.parquet")
            path.unlink()
    train, val = parts(run_prepare(tmp_path, f"--dataset={folder}", "--val_split=test"))
    assert train == TEXTS[:20] and val == TEXTS[20:]
    assert calls == [{"split": "train", "streaming": True}, {"split": "test", "streaming": True}]
    train, val = parts(run_prepare(tmp_path, f"--dataset={folder}"))
    assert sorted(train + val) == sorted(TEXTS[:20])


def test_a_hub_name_goes_to_the_datasets_library(tmp_path, monkeypatch):
    """owner/name and its configuration arrive there as they are; the folder is named after them."""
    import datasets
    load, path = datasets.load_dataset, corpus(tmp_path)

    def load_dataset(name, config, **kw):
        assert (name, config) == ("owner/some.name", "cfg")
        return load("json", data_files={"train": str(path)}, **kw)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run_prepare(tmp_path / "data", "--dataset=owner/some.name", "--subset=cfg", "--name=")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["owner_some_name"]


def test_documents_that_cannot_be_used_are_skipped_and_counted(tmp_path, capsys):
    """The rest is kept; meta.json and the last lines say how many were left out, and why."""
    folder = tmp_path / "texts"
    corpus(folder)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é".encode("latin-1"))
    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(2000))[:1000])
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    (folder / "spaces.txt").write_bytes(b" " * 5_000_000)
    (folder / "picture.png").write_bytes(b"PNG")
    write_jsonl(folder / "rows.jsonl", [{"text": None}, '{"text": "cut', "[1, 2]", {"text": 5}, "[" * 10**5,
                                        {"other": ""}, "", '{"text": "\\ud800"}', {"text": "good"}])
    save_tokenizer(byte_tokenizer(256, pattern=r"\s+(?!\S)|\s+|\S+"), tmp_path / "t.json")
    out = run_prepare(tmp_path, f"--dataset={folder}/*", f"--tokenizer={tmp_path}/t.json")
    train, val = parts(out)
    assert sorted(train + val) == sorted([*TEXTS, "good"])
    assert json.loads((out / "meta.json").read_text())["skipped"] == {
        "empty": 2, "not UTF-8": 2, "binary": 1, "unreadable": 2, "unknown format": 1, "broken line": 3,
        "not text": 1, "no text column": 1, "not tokenizable": 1}
    assert "14 skipped (1 binary, 3 broken line, 2 empty" in capsys.readouterr().out


def test_of_a_file_that_breaks_off_the_rows_before_are_kept_and_counted(tmp_path, capsys):
    """A compressed file that was cut gives what could be read of it, and the last lines say how much."""
    rows = "".join(json.dumps({"text": f"{i} {os.urandom(50).hex()}"}) + "\n" for i in range(4000))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode())[:200_000])
    train, val = parts(run_prepare(tmp_path, f"--dataset={tmp_path}/rows.jsonl.gz"))
    assert len(train + val) > 1000
    assert f"1 skipped (1 unreadable after {len(train + val):,} rows)" in capsys.readouterr().out


def test_a_long_stream_is_encoded_a_little_ahead():
    """The first documents come out long before the last go in: few are in memory at a time."""
    def documents():
        for i in range(2 * os.cpu_count()):
            yield f"{i} " * 500_000, False
        raise AssertionError("too many documents were taken in before the first came out")
    stream = prepare.encode_documents(documents(), byte_tokenizer(256))
    ids, size, _ = next(stream)
    assert size == len(ids) - 1 == 1_000_000
    stream.close()


# ----------------------------------------------------------------------------------------------------------
# what goes wrong


def test_an_interrupt_leaves_nothing_and_changes_nothing(tmp_path, monkeypatch, capsys):
    """Ctrl-C while writing: status 130, one line, no new folder; a folder that was there keeps its bytes."""
    path, encode = corpus(tmp_path), prepare.encode_documents

    def interrupted(*args):
        yield from itertools.islice(encode(*args), 3)
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare, "encode_documents", interrupted)
    for prepare_first in (False, True):
        if prepare_first:
            with monkeypatch.context() as m:
                m.setattr(prepare, "encode_documents", encode)
                run_prepare(tmp_path / "data", f"--dataset={path}")
        before = tree(tmp_path / "data") if prepare_first else {}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_prepare(tmp_path / "data", f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=270")
        assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1
        assert tree(tmp_path / "data") == before
        assert os.listdir(tmp_path / "data") == (["d"] if prepare_first else [])


def stuck_run(path, data):
    """A process that prepares `path` and has stopped while it writes."""
    code = ("import sys, time, prepare\n"
            "def stuck(*args):\n    print('writing', flush=True)\n    time.sleep(60)\n    yield\n"
            "prepare.encode_documents = stuck\nprepare.main(sys.argv[1:])\n")
    arguments = [f"--dataset={path}", f"--data_dir={data}", "--name=d", "--tokenizer=bytes"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True,
                               cwd=Path(prepare.__file__).parent)
    assert process.stdout.readline() == "writing\n"
    process.stdout.close()
    return process


def test_a_killed_run_leaves_no_folder_and_the_next_one_cleans_up(tmp_path):
    """kill -9 while writing: nothing has the folder's name; what was left is gone after the next run."""
    path, data = corpus(tmp_path), tmp_path / "data"
    process = stuck_run(path, data)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [name.startswith(".d.new-") for name in os.listdir(data)] == [True]
    run_prepare(data, f"--dataset={path}")
    assert os.listdir(data) == ["d"]


def test_two_runs_of_one_name_leave_each_other_alone(tmp_path, monkeypatch):
    """Even if both are process 1, each of its own container: a run locks the folder that it makes."""
    path, data = corpus(tmp_path), tmp_path / "data"
    process = stuck_run(path, data)
    [making] = os.listdir(data)
    monkeypatch.setattr(os, "getpid", lambda: process.pid)
    run_prepare(data, f"--dataset={path}")
    assert sorted(os.listdir(data)) == [making, "d"]
    process.kill()
    process.wait()
    run_prepare(data, f"--dataset={path}")
    assert os.listdir(data) == ["d"]


def test_a_run_killed_while_replacing_the_folder_loses_nothing(tmp_path):
    """Between two renames the old folder has another name; the next run, even if it fails, gives it back."""
    path, data = corpus(tmp_path), tmp_path / "data"
    folder = run_prepare(data, f"--dataset={path}")
    before, dead = tree(data), subprocess.Popen(["true"])
    dead.wait()
    folder.rename(data / f".d.old-{dead.pid}")
    with pytest.raises(SystemExit):
        run_prepare(data, f"--dataset={path}", "--tokenizer=bpe", "--vocab_size=60000")
    assert tree(data) == before


def test_a_link_is_written_through(tmp_path):
    """data/NAME may be a link to another disk, empty at first: the folder is made and replaced there."""
    path, data, disk = corpus(tmp_path), tmp_path / "data", tmp_path / "disk"
    data.mkdir()
    (data / "d").symlink_to(disk / "big")
    for flags in ([], ["--max_tokens=50"]):
        run_prepare(data, f"--dataset={path}", *flags)
        assert os.readlink(data / "d") == str(disk / "big")
        assert os.listdir(data) == ["d"] and os.listdir(disk) == ["big"]
        assert set(os.listdir(disk / "big")) == set(prepare.OUTPUTS)


def test_what_desktops_leave_in_a_folder_is_not_in_the_way(tmp_path):
    """A folder that prepare.py wrote, and a desktop was shown, may be replaced."""
    for flags in ([], ["--max_tokens=50"]):
        folder = run_prepare(tmp_path, f"--dataset={corpus(tmp_path)}", *flags)
        assert set(os.listdir(folder)) == set(prepare.OUTPUTS)
        (folder / ".DS_Store").touch()


def test_two_datasets_do_not_share_a_folder_unasked(tmp_path, capsys):
    """a/b.jsonl and a_b.jsonl make the same name: the second is refused until it is given one."""
    first, second = corpus(tmp_path / "a", name="b.jsonl"), corpus(tmp_path, name="a_b.jsonl")
    folder = run_prepare(tmp_path / "data", f"--dataset={first}", "--name=")
    [folder] = (tmp_path / "data").iterdir()
    before = tree(folder)
    with pytest.raises(SystemExit):
        run_prepare(tmp_path / "data", f"--dataset={second}", "--name=")
    assert "--name" in capsys.readouterr().err and tree(folder) == before
    run_prepare(tmp_path / "data", f"--dataset={first}", "--name=", "--max_tokens=50")
    assert tree(folder) != before
    run_prepare(tmp_path / "data", f"--dataset={second}", f"--name={folder.name}")
    assert tree(folder)["train.bin"] == before["train.bin"]


def run_script(*arguments, **options):
    """Run prepare.py as a user would, and return the finished process."""
    return subprocess.run([sys.executable, "prepare.py", *arguments], cwd=Path(prepare.__file__).parent,
                          capture_output=True, text=True, check=False, **options)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    """If the last rename fails, after the old folder was moved aside, the old folder is moved back."""
    path, data, rename = corpus(tmp_path), tmp_path / "data", os.rename
    run_prepare(data, f"--dataset={path}")
    before = tree(data)

    def refuse(source, target):
        if ".new-" in str(source):
            raise OSError(13, "Permission denied")
        rename(source, target)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(SystemExit):
        run_prepare(data, f"--dataset={path}", "--max_tokens=50")
    assert tree(data) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """As a script, with files limited to 4 KB: status 2, one line, no traceback, an empty data folder."""
    path = corpus(tmp_path, [f"{text * 99}" for text in TEXTS])
    result = run_script(f"--dataset={path}", f"--data_dir={tmp_path}/data", "--tokenizer=bytes",
                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot write") and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("package, dataset", [("rustbpe", ""), ("datasets", "owner/name")])
@pytest.mark.parametrize("found", ["nothing", "a folder"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys, package, dataset, found):
    """The line says what to install. A folder of the package's name is an empty module, not the package."""
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package) if found == "a folder" else None)
    with pytest.raises(SystemExit):
        run_prepare(tmp_path, f"--dataset={dataset or corpus(tmp_path)}",
                    f"--tokenizer={'bytes' if dataset else 'bpe'}")
    assert capsys.readouterr().err == f"error: {package} is not installed: pip install -r requirements.txt\n"


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch, capsys):
    """A shared library that it lacks is no package: the line says what Python said."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "rustbpe.py").write_text("raise ImportError('libx.so.1: cannot open it')")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    monkeypatch.delitem(sys.modules, "rustbpe", raising=False)
    with pytest.raises(SystemExit):
        run_prepare(tmp_path, f"--dataset={corpus(tmp_path)}", "--tokenizer=bpe")
    line = capsys.readouterr().err
    assert "libx.so.1" in line and "broken" in line and "not installed" not in line and line.count("\n") == 1


def test_a_dataset_of_many_configurations_asks_for_subset(tmp_path, monkeypatch, capsys):
    """However long the list of them is."""
    import datasets

    def load_dataset(*args, **kw):
        raise ValueError(f"Config name is missing. Pick one among: {['a configuration'] * 99}")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SystemExit):
        run_prepare(tmp_path, "--dataset=owner/name")
    assert "--subset" in capsys.readouterr().err


def test_max_tokens_that_end_before_a_validation_document_are_named(tmp_path, capsys):
    """Raising val_fraction alone would be poor advice."""
    with pytest.raises(SystemExit):
        run_prepare(tmp_path, f"--dataset={corpus(tmp_path)}", "--max_tokens=1", "--val_fraction=0.0001")
    assert "raise --max_tokens" in capsys.readouterr().err


@pytest.mark.parametrize("n_vocab, is_large", [(257, False), (50_257, True)])
def test_the_next_command_has_no_table_that_is_too_large(tmp_path, capsys, n_vocab, is_large):
    """50,257 tokens squared are ten gigabytes, and Adam's moments twice that again."""
    save_tokenizer(byte_tokenizer(n_vocab - 1), tmp_path / "t.json")
    run_prepare(tmp_path, f"--dataset={corpus(tmp_path)}", f"--tokenizer={tmp_path}/t.json")
    assert ("--use_bigram_table=False" in capsys.readouterr().out.splitlines()[-1]) == is_large


def test_as_a_script_it_reports_and_names_the_next_command(tmp_path):
    """The last lines tell where the data is, its size, the vocabulary, bytes per token, what to do next."""
    result = run_script(f"--dataset={corpus(tmp_path)}", f"--data_dir={tmp_path}/my data",
                        "--tokenizer=bytes", "--val_fraction=0.5", "--name=d")
    assert (result.returncode, result.stderr) == (0, "")
    for words in (f"{tmp_path}/my data/d: ", " training tokens in ", " validation tokens in ", "0 skipped",
                  "vocabulary 257", " bytes per token",
                  "next: "):
        assert words in result.stdout
    command = shlex.split(result.stdout.splitlines()[-1].removeprefix("next: "))
    assert command == ["python", "train.py", "config/quickstart.py", f"--dataset={tmp_path}/my data/d"]


def bad_files(tmp):
    """Write the files that the bad runs below name."""
    import pyarrow.parquet
    corpus(tmp / "ok")
    corpus(tmp / "copy", name="train.jsonl")
    corpus(tmp / "copy", [""], name="test.jsonl")
    (tmp / "lines").mkdir()
    (tmp / "lines" / "a.txt").write_text("one\ntwo\n")
    (tmp / "letter.txt").write_text("a")
    (tmp / "few").mkdir()
    for i in range(2):
        (tmp / "few" / f"{i}.txt").write_text("one of two documents")
    (tmp / "table.xls").write_text("text\nhello\n")
    (tmp / "latin.txt").write_bytes("é".encode("latin-1"))
    pyarrow.parquet.write_table(pyarrow.table({"text": [["a", "b"]]}), tmp / "list.parquet")
    write_jsonl(tmp / "nothing.jsonl", [{"text": ""}, {"text": "\0"}])
    write_jsonl(tmp / "other.jsonl", [{"body": "x", "id": 1}, {"text": "y"}])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp / "other.parquet")
    (tmp / "a_file").write_text("")
    (tmp / "data").mkdir()
    (tmp / "used" / "d").mkdir(parents=True)
    (tmp / "used" / "d" / "thesis.tex").write_text("years of work")
    (tmp / "not.json").write_text("[1, 2]")
    for name, encoding in (("no_end", byte_tokenizer(None)), ("holes", byte_tokenizer(256, missing=b"qz")),
                           ("huge", byte_tokenizer(65_536))):
        save_tokenizer(encoding, tmp / f"{name}.json")


BAD_PREPARE = [  # what is wrong, the arguments ({tmp} holds the files above), words of the line that says so
    ("no match", ["--dataset={tmp}/*.txtt"], ["no file matches"]),
    ("no such file", ["--dataset={tmp}/missing.jsonl"], ["no file matches", "missing.jsonl"]),
    ("no network for a dataset", ["--dataset=owner/name"], ["owner/name", "reach", "glob"]),
    ("no such split", ["--dataset={tmp}/copy", "--split=tran"], ["tran", "'train'"]),
    ("no such validation split", ["--dataset={tmp}/copy", "--val_split=vla"], ["vla", "'train'"]),
    ("no such subset", ["--dataset={tmp}/copy", "--subset=en"], ["'en'", "default"]),
    ("no text column in a stream", ["--dataset={tmp}/copy", "--text_column=body"], ["'body'", "text, n"]),
    ("no text column in .jsonl", ["--dataset={tmp}/other.jsonl"], ["other.jsonl", "'text'", "body, id"]),
    ("no text column in .parquet", ["--dataset={tmp}/other.parquet"], ["other.parquet", "'text'", "body"]),
    ("lines as documents", ["--dataset={tmp}/lines"], ["every line", "**/*.txt"]),
    ("splits of local files", ["--val_split=test"], ["Hugging Face"]),
    *((f"{reason} with {tokenizer}", ["--dataset={tmp}/" + file, f"--tokenizer={tokenizer}"],
       ["no usable document", f"1 {reason}", ".jsonl"]) for tokenizer in ("bytes", "bpe") for file, reason in
      [("table.xls", "unknown format"), ("latin.txt", "not UTF-8"), ("list.parquet", "not text")]),
    ("nothing usable", ["--dataset={tmp}/nothing.jsonl"], ["no usable document", "1 binary, 1 empty"]),
    ("nothing to validate on", ["--dataset={tmp}/few/*", "--val_fraction=0.001"],
     ["raise --val_fraction"]),
    ("a document too short to cut", ["--dataset={tmp}/letter.txt"], ["cut the text into more documents"]),
    ("nothing to train on", ["--dataset={tmp}/few/*", "--val_fraction=0.999"], ["lower --val_fraction"]),
    ("empty validation split", ["--dataset={tmp}/copy", "--val_split=test"], ["split 'test'", "1 empty"]),
    ("val_fraction of 0", ["--val_fraction=0"], ["val_fraction=0.0", "between"]),
    ("val_fraction of 1", ["--val_fraction=1"], ["val_fraction=1.0", "between"]),
    ("negative max_tokens", ["--max_tokens=-1"], ["max_tokens=-1"]),
    ("vocabulary over uint16", ["--tokenizer=bpe", "--vocab_size=65537"], ["65537", "65536"]),
    ("vocabulary under the bytes", ["--tokenizer=bpe", "--vocab_size=256"], ["256", "257"]),
    ("text too small", ["--tokenizer=bpe", "--vocab_size=5000"], ["5000", "lower --vocab_size"]),
    ("too little text of use", ["--dataset={tmp}/**/*.txt", "--tokenizer=bpe"], ["2048", "1 not UTF-8"]),
    ("unknown encoding", ["--tokenizer=gtp2"], ["gtp2", "'bpe'", "gpt2", "cl100k_base"]),
    ("the released models' encoding", ["--tokenizer=tinypython_2k"], ["circuit_sparsity"]),
    ("no network for an encoding", ["--tokenizer=gpt2"], ["gpt2", "no network", "'bytes'"]),
    ("encoding over uint16", ["--tokenizer={tmp}/huge.json"], ["65537", "65536"]),
    ("encoding without an end", ["--tokenizer={tmp}/no_end.json"], ["<|endoftext|>"]),
    ("encoding without all bytes", ["--tokenizer={tmp}/holes.json"], ["lacks some bytes"]),
    ("missing tokenizer.json", ["--tokenizer={tmp}/missing.json"], ["missing.json", "No such file"]),
    ("another kind of .json", ["--tokenizer={tmp}/not.json"], ["not.json is not a tokenizer"]),
    ("data_dir is a file", ["--data_dir={tmp}/a_file"], ["cannot write", "a_file"]),
    ("data_dir cannot be made", ["--data_dir={tmp}/a_file/data"], ["cannot write", "a_file"]),
    ("a folder of someone else's", ["--data_dir={tmp}/used"], ["used/d", "thesis.tex", "--name"]),
    ("a name outside data_dir", ["--name=../d"], ["'../d'", "--name"]),
    ("no name", ["--dataset=*", "--name="], ["--name"]),
    ("unknown setting", ["--vocabsize=300"], ["vocabsize", "vocab_size"]),
    ("wrong type", ["--max_tokens=many"], ["max_tokens", "many", "int"]),
]


@pytest.mark.parametrize("what, arguments, words", BAD_PREPARE, ids=[bad[0] for bad in BAD_PREPARE])
def test_bad_input_to_prepare_is_one_line(tmp_path, monkeypatch, capfd, what, arguments, words):
    """Status 2 and one line on stderr that names the problem; no file appears, disappears or changes."""
    def no_network(name):
        raise ConnectionError("no\nnetwork")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    bad_files(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_prepare(tmp_path / "data", f"--dataset={tmp_path}/ok/*.jsonl",
                    *(argument.format(tmp=tmp_path) for argument in arguments))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert tree(tmp_path) == before and not list(tmp_path.glob("**/.d.*"))


def test_max_tokens_limits_training_tokens_alone(tmp_path):
    """A validation split of its own is taken whole, however few training tokens are asked for."""
    folder = tmp_path / "copy"
    corpus(folder, TEXTS[:20], "train.jsonl")
    corpus(folder, TEXTS[20:], "test.jsonl")
    train, val = parts(run_prepare(tmp_path, f"--dataset={folder}", "--val_split=test", "--max_tokens=1"))
    assert train == TEXTS[:1] and val == TEXTS[20:]


def test_of_two_merges_that_spell_the_same_the_first_counts(monkeypatch):
    """The second's id stays unused, so that texts are merged as they were in training."""
    import rustbpe

    class Trainer:
        vocab_size = 260

        def train_from_iterator(self, texts, vocab_size):
            pass

        def get_pattern(self):
            return r"\w+|\W+"

        def get_mergeable_ranks(self):
            merges = [b"ab", b"bc", b"abc", b"abc"]  # the last two from (ab, c) and from (a, bc)
            return [*((bytes([b]), b) for b in range(256)), *zip(merges, range(256, 260), strict=True)]

    monkeypatch.setattr(rustbpe, "Tokenizer", Trainer)
    monkeypatch.setattr(prepare, "vocab_size", 261)
    assert prepare.train_bpe().encode("abc") == [258]
