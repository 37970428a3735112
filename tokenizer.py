"""The tokenizer of a data set or a run: its file, tokenizer.json, and how a single token is spelled.

prepare.py makes a tokenizer and writes the file beside the data. Training copies it to out_dir, where
sample.py and circuit.py find it. The sha256 of the file tells tokenizers apart: data and
checkpoints keep it.
"""
import hashlib
import json
import os

import tiktoken

from configurator import one_line

PLUG_IN = "tinypython_2k is in the authors' package: pip install git+https://github.com/openai/circuit_sparsity"


def tokenizer_in(folder):
    """Where the tokenizer of a data set, of a run or of a released model is."""
    return os.path.join(folder, "tokenizer.json")


def read_tokenizer(path):
    """The text of a tokenizer.json and its sha256; OSError or UnicodeDecodeError if it cannot be read."""
    with open(path, "rb") as f:
        data = f.read()
    return data.decode(), hashlib.sha256(data).hexdigest()


def load_tokenizer(path):
    """Return the tiktoken.Encoding that `save_tokenizer` wrote; ValueError if `path` holds no such."""
    try:
        spec = json.loads(read_tokenizer(path)[0])
        tokens = [t.encode() if isinstance(t, str) else bytes(list(t or [])) for t in spec["tokens"]]
        ranks = {token: i for i, token in enumerate(tokens) if token}
        special = spec["special_tokens"]
        if len({*ranks.values(), *special.values()}) < sum(map(bool, tokens)) + len(special):
            raise ValueError("a token or an id occurs twice")
        if not spec["pattern"] or "" in special or max(special.values(), default=0) >= 2**31:
            raise ValueError("an empty pattern or token, or a large id, on which tiktoken hangs or dies")
        return tiktoken.Encoding(spec["name"], pat_str=spec["pattern"], mergeable_ranks=ranks,
                                 special_tokens=special)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{path} is not a tokenizer that prepare.py wrote ({one_line(e)})") from e


DIGEST = ", sha256 "  # what stands before it in the name that a released model's folder gives its tokenizer


def name_with_digest(model, text=None):
    """The name of the model's tokenizer, whose tokenizer.json has this `text`, and the digest of that file:
    of models whose file is lost too. What tiktoken knows by its name needs no digest."""
    name, digest = getattr(model, "tokenizer_name", "bpe"), getattr(model, "tokenizer_sha256", None)
    if text:
        name, of_text = json.loads(text)["name"], hashlib.sha256(text.encode()).hexdigest()
        if digest not in (None, of_text):
            raise ValueError("this is not the tokenizer.json of the model: give that of its run or its data")
        digest = of_text
    return name + DIGEST + digest if digest and name not in tiktoken.list_encoding_names() else name


def tokenizer_named(name, path):
    """What `name_with_digest` was given, the name and the digest or None; the digest, too, of the file at
    `path`, if there is one: ValueError if that is another."""
    name, _, digest = str(name).partition(DIGEST)
    beside = read_tokenizer(path)[1] if os.path.exists(path) else None
    if digest and beside not in (None, digest):
        raise ValueError(f"{path} is not the tokenizer that the model's folder names: put that one there")
    return name, beside or digest or None


def save_tokenizer(encoding, path):
    """Write `encoding` as JSON, one token per line in the order of ids.

    A token is a string if its bytes are UTF-8, else a list of byte values; null is an id that no text has.
    """
    tokens = [None] * (max(encoding._mergeable_ranks.values()) + 1)
    for token, i in encoding._mergeable_ranks.items():
        try:
            tokens[i] = token.decode()
        except UnicodeDecodeError:
            tokens[i] = list(token)
    lines = ",\n".join(json.dumps(token, ensure_ascii=False) for token in tokens)
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write(f'{{"name": {json.dumps(encoding.name)},\n"pattern": {json.dumps(encoding._pat_str)},\n'
                f'"special_tokens": {json.dumps(encoding._special_tokens)},\n"tokens": [\n{lines}\n]}}\n')


def token_bytes(encoding, token):
    """The bytes of a token; of an id that the tokenizer does not have, those of a replacement character."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def one_token(tokenizer, text):
    """The id of a text that is one token; ValueError, with the pieces, if it is more, or none."""
    ids = tokenizer.encode(text, disallowed_special=())
    if len(ids) != 1:
        pieces = [tokenizer.decode([i]) for i in ids]
        raise ValueError(f"{text!r} is {len(ids)} tokens of this model's tokenizer, {pieces}, not one")
    return ids[0]


def spell(encoding, token):
    """A token on one line: ⏎ is a newline, ⇥ a tab, ␣ a space where there is nothing else; what cannot be
    printed is escaped."""
    text = token_bytes(encoding, token).decode(errors="replace").replace("\n", "⏎").replace("\t", "⇥")
    spaces = text.count(" ")
    if text.strip(" ⏎"):
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text.replace(" ", "␣") if spaces < 4 else text.replace(" ", "") + f"␣×{spaces}"
