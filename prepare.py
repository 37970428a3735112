"""Text in, tokens out: data/NAME/{train.bin,val.bin,tokenizer.json,meta.json}.

    python prepare.py                                                 # Python's standard library, no network
    python prepare.py --dataset=owner/name --max_tokens=1000000000    # a Hugging Face dataset, streamed
    python prepare.py --dataset='text/**/*.jsonl' --tokenizer=gpt2    # local files

The bins are raw little-endian uint16: one document after the other, each followed by <|endoftext|>. The same
input gives the same bytes. Documents pass through as a stream: memory grows with the longest of them, to
about ten times its size, and not with the corpus. The folder gets its name only once it is complete.
"""
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import sys
import sysconfig
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiktoken

from configurator import check_output, configure, ends_explained, fail, one_line, settings_of
from documents import FORMATS, check_column, file_format, files_of, read_files
from tokenizer import PLUG_IN, load_tokenizer, read_tokenizer, save_tokenizer, tokenizer_in

# -----------------------------------------------------------------------------
# settings
dataset = "python_stdlib"  # or files, by path or glob (** recurses): .txt .md .py .jsonl .parquet, or .gz;
#                            or 'owner/name' on the Hugging Face hub, or a folder with a copy of one
subset = ""                # Hugging Face only: the configuration, for datasets that have several
split = "train"            # Hugging Face only: where the training documents come from
val_split = ""             # Hugging Face only: where validation documents come from; '' for val_fraction
val_fraction = 0.01        # of the documents; its own bytes decide. Of an only document: its last part
text_column = "text"       # of .jsonl, .parquet and Hugging Face; any other file is one document,
separator = "<|endoftext|>"  # or several, if it is a .txt with this between them; '' never splits,
#                              \n, \r and \t are a new line, a return and a tab
max_tokens = 0             # stop after the document that completes this many training tokens; 0 takes all
tokenizer = "bpe"          # 'bpe' trains one on the data, 'bytes' has a token per byte; or the name of a
#                            tiktoken encoding, such as 'gpt2'; or the path of an earlier tokenizer.json
vocab_size = 2048          # of 'bpe', <|endoftext|> included; the paper's size
bpe_sample_bytes = 64_000_000  # 'bpe' learns from this much of the training text, taken from its beginning
name = ""                  # of the folder; '' makes one from `dataset`
data_dir = "data"          # where the folder goes
# -----------------------------------------------------------------------------

OUTPUTS = ("train.bin", "val.bin", "tokenizer.json", "meta.json")
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # which desktops leave in any folder


# -----------------------------------------------------------------------------
# documents

def passes():
    """What to read, one after the other: (split, fraction of its documents to hold out for validation)."""
    return [(split, 0.0), (val_split, 1.0)] if val_split else [(split, val_fraction)]


def is_held_out(data, fraction):
    """Whether a document with these bytes is in the `fraction` held out: its hash, as a number, decides."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < fraction * 2**64


def local_files():
    """Return the files that `dataset` names, sorted; None if it is for the `datasets` library to find."""
    if dataset == "python_stdlib":
        root = sysconfig.get_path("stdlib")
        paths = (os.path.join(folder, file) for folder, _, files in os.walk(root) for file in files)
        return sorted(path for path in paths  # in no site-packages, nor Debian's dist-packages
                      if path.endswith(".py") and "-packages" not in path[len(root):])
    if os.path.exists(dataset):
        return [dataset] if os.path.isfile(dataset) else None
    if any(c in dataset for c in "*?[") or file_format(dataset) in FORMATS:
        return files_of(dataset.replace("[", "[[]")) or files_of(dataset)  # a bracket may be part of a name


def split_documents(source, fraction, skipped):
    """Yield (text, held out?) of each document, in fixed order; of an only one the end is held out."""
    texts = read_documents(source, skipped)
    first = list(itertools.islice(texts, 2))
    if not first:
        fail(f"no usable document in split {source!r} of {dataset!r}, {summary(skipped)}; files: {FORMATS}")
    if len(first) == 1 < len(first[0]) and 0 < fraction < 1:
        tail = max(1, int(fraction * len(first[0])))
        yield first[0][-tail:], True  # before the rest, after which max_tokens may end all
        yield first[0][:-tail], False
    else:
        for text in itertools.chain(first, texts):
            yield text, is_held_out(text.encode(), fraction)


def read_documents(source, skipped):
    """Yield the texts that are of use; count in `skipped` those that are not."""
    paths = local_files()
    found = read_hub(source) if paths is None else read_files(paths, text_column, separator, skipped)
    for document in found:
        try:
            data = document.encode() if isinstance(document, str) else document or b""
            text = data.decode()
        except UnicodeError:  # an encoding from before UTF-8, or half a surrogate pair, which JSON can spell
            skipped["not UTF-8"] += 1
        except AttributeError:
            skipped["not text"] += 1
        else:
            if text and "\0" not in text:
                yield text
            else:
                skipped["binary" if text else "empty"] += 1


def read_hub(source):
    """Yield the text column of a Hugging Face dataset as it arrives; nothing of it is stored."""
    from datasets import load_dataset
    print(f"streaming {dataset}, split {source}", flush=True)
    logging.getLogger("huggingface_hub").setLevel("ERROR")  # our one line at the end, not one for each retry
    try:
        rows = load_dataset(dataset, subset or None, split=source, streaming=True)
        if os.path.isdir(dataset) and rows.info.builder_name == "text":
            fail("every line would become a document: write " + shlex.quote(f"--dataset={dataset}/**/*.txt"))
        for row in rows:
            check_column(row, text_column, dataset)
            yield row[text_column]
    except Exception as e:  # noqa: BLE001 - there is no end to what a network can raise
        advice = "choose one of its configurations with --subset" if "onfig" in str(e) else (
            "for files on this machine write a path or glob, such as --dataset='folder/**/*.txt'")
        fail(f"the `datasets` library cannot read {dataset!r} ({one_line(e)}); {advice}")


# -----------------------------------------------------------------------------
# tokenizers: each becomes a tiktoken.Encoding, and a file that a person can read

def get_encoding():
    """Return the encoding that `tokenizer` asks for, known to fit uint16 and to spell every text."""
    if tokenizer == "bpe":
        return train_bpe()
    if tokenizer == "bytes":  # nothing ever merges, so where the pattern cuts is only a matter of speed
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}", special_tokens={"<|endoftext|>": 256},
                                 mergeable_ranks={bytes([b]): b for b in range(256)})
    known = tiktoken.list_encoding_names()
    if tokenizer not in known and not tokenizer.endswith(".json"):
        fail(f"tokenizer={tokenizer!r} does not exist: choose 'bpe', 'bytes', the path of a tokenizer.json, "
             f"or a tiktoken encoding: {', '.join(known)}; {PLUG_IN}")
    try:
        encoding = tiktoken.get_encoding(tokenizer) if tokenizer in known else load_tokenizer(tokenizer)
    except Exception as e:  # noqa: BLE001 - what a failed download raises depends on the plug-in
        fail(f"cannot load tokenizer={tokenizer!r} ({one_line(e)}); 'bpe' and 'bytes' need no download")
    if encoding.n_vocab > 2**16:
        fail(f"tokenizer={tokenizer!r} has {encoding.n_vocab} tokens, uint16 holds {2**16}: take another")
    if "<|endoftext|>" not in encoding.special_tokens_set:
        fail(f"tokenizer={tokenizer!r} has no <|endoftext|> to end documents with: take another one")
    if sum(len(token) == 1 for token in encoding.token_byte_values()) < 256:
        fail(f"tokenizer={tokenizer!r} lacks some bytes, so it cannot spell every text: take another one")
    return encoding


def train_bpe():
    """Train a byte-level BPE of `vocab_size` tokens on the training text; <|endoftext|> is the last id."""
    from rustbpe import Tokenizer
    print(f"training a tokenizer of {vocab_size:,} tokens", flush=True)
    trainer, skipped = Tokenizer(), Counter()
    trainer.train_from_iterator(training_sample(skipped), vocab_size - 1)
    if trainer.vocab_size < vocab_size - 1:
        fail(f"vocab_size={vocab_size} needs more training text: this gives {trainer.vocab_size + 1}, "
             f"{summary(skipped)}; lower --vocab_size, add text, or take --tokenizer=bytes")
    # Two merges may spell the same bytes. tiktoken only knows the first; the id of the second stays unused.
    merges = sorted(trainer.get_mergeable_ranks(), key=lambda merge: merge[1], reverse=True)
    ranks = {bytes(token): i for token, i in merges}
    return tiktoken.Encoding("bpe", pat_str=trainer.get_pattern(), mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": vocab_size - 1})


def training_sample(skipped):
    """Yield the first `bpe_sample_bytes` of the training text, in pieces that the trainer's regular
    expression can take: a very long run of spaces overflows its stack."""
    source, fraction = passes()[0]
    left = bpe_sample_bytes
    for text, held_out in split_documents(source, fraction, skipped):
        if not held_out:
            data = text.encode()
            text = data[:left].decode(errors="ignore")
            yield from (text[i:i + 50_000] for i in range(0, len(text), 50_000))
            left -= len(data)
        if left <= 0:
            return


# -----------------------------------------------------------------------------
# encoding

def encode_documents(documents, encoding):
    """Yield (ids, number of bytes, held out?) of each document, in order, encoded by all cores just ahead.

    ids, uint16, ends with <|endoftext|>; None if the encoding's regular expression overflows its stack, as
    on a million spaces in a row. Text that spells <|endoftext|> is encoded like any other.
    """
    def encode(text, held_out):
        try:
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            ids = np.append(ids, np.uint32(encoding.eot_token)).astype("<u2")
        except ValueError:
            ids = None
        return ids, len(text.encode()), held_out

    workers, ahead, characters_ahead = os.cpu_count(), deque(), 0
    with ThreadPoolExecutor(workers) as pool:
        for text, held_out in documents:
            ahead.append((pool.submit(encode, text, held_out), len(text)))
            characters_ahead += len(text)
            while characters_ahead > workers * 2**20:
                future, size = ahead.popleft()
                characters_ahead -= size
                yield future.result()
        while ahead:
            yield ahead.popleft()[0].result()


def write_bins(folder, encoding, skipped):
    """Write train.bin and val.bin; return of each its tokens, bytes of text, documents and sha256."""
    counts = {part: Counter(tokens=0, bytes=0, documents=0) for part in ("train", "val")}
    digests = {part: hashlib.sha256() for part in counts}
    start = shown = time.time()
    live = sys.stdout.isatty()
    with open(f"{folder}/train.bin", "wb") as train, open(f"{folder}/val.bin", "wb") as val:
        for source, fraction in passes():
            documents = split_documents(source, fraction, skipped)
            for ids, size, held_out in encode_documents(documents, encoding):
                if ids is None:
                    skipped["not tokenizable"] += 1
                    continue
                part = "val" if held_out else "train"
                (val if held_out else train).write(ids)
                digests[part].update(ids)
                counts[part].update(tokens=len(ids), bytes=size, documents=1)
                if time.time() - shown > (1 if live else 30):
                    shown = time.time()
                    done = counts["train"] + counts["val"]
                    line = f"{done['tokens']:,} tokens, {done['bytes'] / 1e6 / (shown - start):.1f} MB/s"
                    print(f"{line:<60}", end="\r" if live else "\n", flush=True)
                if 0 < max_tokens <= counts["train"]["tokens"] and not held_out:
                    break
    return {part: dict(counts[part], sha256=digests[part].hexdigest()) for part in counts}


# -----------------------------------------------------------------------------
# the folder

def check_settings(folder, target):
    """End the script if a setting makes no sense, or if `target` is not ours to replace."""
    if not re.fullmatch(r"[\w-][\w.-]*", folder):
        fail(f"{folder!r} is no name for a folder: give --name=, of letters, digits, '_', '-' and '.'")
    foreign = sorted(set(os.listdir(target)) - {*OUTPUTS, *LITTER}) if os.path.exists(target) else []
    if foreign:
        fail(f"{target} holds {foreign[0]}, which prepare.py did not write: choose another --name")
    if os.path.exists(f"{target}/meta.json") and not name:
        with open(f"{target}/meta.json", encoding="utf-8", errors="replace") as f:
            if f'"dataset": {json.dumps(dataset)}' not in f.read():
                fail(f"{target} was not made of dataset={dataset!r}: choose a --name, or delete that folder")
    paths = local_files()
    if paths == []:
        fail(f"no file matches dataset={dataset!r}, seen from {os.getcwd()}")
    if paths and (subset or val_split or split != "train"):
        fail("subset, split and val_split are for Hugging Face datasets: leave them out")
    if not val_split and not 0 < val_fraction < 1:
        fail(f"val_fraction={val_fraction} is not between 0 and 1")
    if max_tokens < 0:
        fail(f"max_tokens={max_tokens} is negative: 0 takes everything")
    if tokenizer == "bpe" and not 257 <= vocab_size <= 2**16:
        fail(f"vocab_size={vocab_size} is not in 257 (bytes and <|endoftext|>) .. {2**16} (uint16)")


def build(folder):
    """Write the four files into `folder`; return what meta.json says."""
    encoding = get_encoding()
    save_tokenizer(encoding, tokenizer_in(folder))
    _, digest = read_tokenizer(tokenizer_in(folder))
    skipped = Counter()
    counts = write_bins(folder, encoding, skipped)
    train, val = counts["train"]["documents"], counts["val"]["documents"]
    if not train or not val:
        advice = f"{'raise' if train else 'lower'} --val_fraction, or cut the text into more documents"
        if 0 < max_tokens <= counts["train"]["tokens"]:
            advice = f"max_tokens={max_tokens} ended it so soon: raise --max_tokens or --val_fraction"
        fail(f"{train} documents are in train.bin and {val} in val.bin, {summary(skipped)}: {advice}")
    meta = {"vocab_size": encoding.n_vocab, "tokenizer": encoding.name, "tokenizer_sha256": digest, **counts,
            "source": settings_of(globals()), "skipped": skipped, "date": time.strftime("%Y-%m-%d")}
    with open(f"{folder}/meta.json", "w", encoding="utf-8") as f:
        json.dump(meta, f, indent=1)
    return meta


def clean_up(target):
    """Delete what this run or a killed one left beside `target`; put back what it had moved aside."""
    parent, folder = os.path.split(target)
    for entry in os.listdir(parent):
        leftover = re.fullmatch(rf"\.{re.escape(folder)}\.(new|old)-\w+", entry)
        lock = lock_of(os.path.join(parent, entry)) if leftover else None
        if lock is None:
            continue
        if leftover[1] == "old" and not os.path.exists(target):
            os.rename(os.path.join(parent, entry), target)
        else:
            shutil.rmtree(os.path.join(parent, entry), ignore_errors=True)
        os.close(lock)


def lock_of(folder):
    """Lock a folder, which may be renamed, until what this returns is closed; None if another run has it."""
    lock = None
    try:
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):  # or another run has just cleaned up
        if lock is not None:
            os.close(lock)
        return None
    except OSError:
        pass  # a file system without locks
    return lock


def summary(skipped):
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(skipped.items()))
    return f"{sum(skipped.values()):,} skipped" + (f" ({reasons})" if reasons else "")


@ends_explained("shorten the longest document: see the top of prepare.py")
def main(argv=None):
    """Prepare `dataset`. A run that fails or is interrupted leaves everything as it was."""
    configure(globals(), argv)
    start = time.time()
    folder = name or re.sub(r"[^\w-]+", "_", dataset).strip("_")
    target = os.path.join(data_dir or ".", folder)
    if os.path.islink(target):  # to a larger disk, perhaps: all is written there
        target = os.path.realpath(target)
    parent, entry = os.path.split(target)
    run, locks = secrets.token_hex(8), []
    new, old = (os.path.join(parent, f".{entry}.{kind}-{run}") for kind in ("new", "old"))
    try:
        check_settings(folder, target)
        os.makedirs(parent, exist_ok=True)
        clean_up(target)
        try:
            os.mkdir(new)
            locks.append(lock_of(new))
            meta = build(new)
            if os.path.exists(target):
                locks.append(lock_of(target))
                os.rename(target, old)
            os.rename(new, target)
        finally:
            for lock in filter(None, locks):
                os.close(lock)
            clean_up(target)
    except OSError as e:
        check_output(after_error=True)
        fail(f"cannot write {target}: {e.strerror or one_line(e)}")
    except ImportError as e:
        if isinstance(e, ModuleNotFoundError) or "unknown location" in str(e):
            fail(f"{e.name} is not installed: pip install -r requirements.txt")
        fail(f"a package is broken ({one_line(e)}): uninstall it, then pip install -r requirements.txt")
    except KeyboardInterrupt:
        print("interrupted: everything is as it was", file=sys.stderr)
        raise SystemExit(130) from None
    train, val = meta["train"], meta["val"]
    bytes_per_token = (train["bytes"] + val["bytes"]) / (train["tokens"] + val["tokens"])
    print(f"{target}: {train['tokens']:,} training tokens in {train['documents']:,} documents, "
          f"{val['tokens']:,} validation tokens in {val['documents']:,}; {summary(meta['skipped'])}")
    print(f"vocabulary {meta['vocab_size']:,} ({meta['tokenizer']}), {bytes_per_token:.2f} bytes per token, "
          f"{time.time() - start:.1f} s")
    place = folder if data_dir == "data" else os.path.abspath(target)
    command = ["python", "train.py", "config/quickstart.py", f"--dataset={place}"]
    if meta["vocab_size"] > 2**14:  # the table has vocab_size squared entries: 10 GB with GPT-2's
        command.append("--use_bigram_table=False")
    print("next:", shlex.join(command))


if __name__ == "__main__":
    main()
