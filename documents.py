"""Documents from files: which files a pattern names, and what each format holds.

prepare.py calls this. `skipped`, a Counter, counts by reason what cannot be used.
"""
import functools
import glob
import gzip
import itertools
import json
import os
import re
import zlib

from configurator import fail

FORMATS = (".txt", ".md", ".py", ".jsonl", ".parquet")
ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t"}  # in a separator, as a command line has them


def file_format(path):
    return os.path.splitext(path.removesuffix(".gz"))[1].lower()


def files_of(pattern):
    """The files that match, sorted, each real file once, whatever links there are. ** is for any folders."""
    paths = sorted(matches(pattern), reverse=True)
    return sorted({os.path.realpath(path): path for path in paths if os.path.isfile(path)}.values())


def matches(pattern, seen=None):
    """The paths that match: ** stands for any folders, each of which is searched once."""
    before, *after = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if not after:
        return glob.glob(pattern)
    found, seen = [], set() if seen is None else seen
    for top in glob.glob(before) if before else [""]:
        for folder, inside, _ in os.walk(top or ".", followlinks=True):
            here = os.path.realpath(folder), after[0]
            inside[:] = sorted(name for name in inside if name[0] != "." and here not in seen)
            if here not in seen:
                seen.add(here)
                where = folder if top else folder.removeprefix(".").removeprefix("/")
                found += matches(os.path.join(glob.escape(where), after[0] or "*"), seen)
    return found


def read_files(paths, text_column, separator, skipped):
    """Yield the documents of all files; what was read of a file before it breaks off is kept."""
    for path in paths:
        rows = 0
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
                documents = read_file(f, path, text_column, separator, skipped)
                for rows, document in enumerate(documents, start=1):
                    yield document
        except (OSError, EOFError, zlib.error, ValueError, RuntimeError):  # no permission, or broken
            skipped[f"unreadable after {rows:,} rows" if rows else "unreadable"] += 1


def read_file(f, path, text_column, separator, skipped):
    """Yield what a file holds: the text column of rows of .jsonl and .parquet, all bytes of the others."""
    kind = file_format(path)
    if kind == ".jsonl":
        yield from read_jsonl(f, path, text_column, skipped)
    elif kind == ".parquet":
        yield from read_parquet(f, path, text_column)
    elif kind in FORMATS:
        texts = split_text(f, separator) if separator and kind == ".txt" else iter([f.read()])
        first, second = next(texts).removeprefix(b"\xef\xbb\xbf"), next(texts, None)  # a byte order mark
        if second is None:
            yield first
        else:
            yield from filter(None, map(bytes.strip, itertools.chain((first, second), texts)))
    else:
        skipped["unknown format"] += 1


def split_text(f, separator):
    """Yield what stands between separators, at least one piece; little more than one is in memory."""
    mark = re.sub(r"\\[nrt]", lambda escape: ESCAPES[escape[0]], separator).encode()
    text, searched, is_split = bytearray(), 0, False
    while chunk := f.read(2**20):
        text += chunk
        while (end := text.find(mark, searched)) >= 0:
            yield bytes(text[:end])
            del text[:end + len(mark)]
            searched, is_split = 0, True
        searched = max(0, len(text) - len(mark) + 1)
    yield bytes(text)
    if not is_split and separator != "<|endoftext|>":
        say_once(f"a .txt without separator={separator!r} in it is one document")


def read_jsonl(f, path, text_column, skipped):
    """Yield the text column of each line. The first row must have one; a later row without it is skipped."""
    first = True
    for line in filter(bytes.strip, f):
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            skipped["broken line"] += 1
            continue
        if first:
            check_column(row, text_column, path)
        first = False
        if text_column in row:
            yield row[text_column]
        else:
            skipped["no text column"] += 1


def read_parquet(f, path, text_column):
    """Yield the text column, with one batch of rows in memory at a time."""
    import pyarrow.parquet
    table = pyarrow.parquet.ParquetFile(f)
    check_column(table.schema_arrow.names, text_column, path)
    for rows in table.iter_batches(batch_size=1000, columns=[text_column]):
        yield from rows.column(0).to_pylist()


def check_column(columns, text_column, where):
    if text_column not in columns:
        fail(f"{where} has no column {text_column!r}: choose --text_column from {', '.join(columns)}")


@functools.cache
def say_once(line):
    print(line, flush=True)
