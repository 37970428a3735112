"""tokenizer.py: an encoding comes back from its file, a file that holds none says so, and any token has a
spelling on one line.
"""
import hashlib

import pytest
import tiktoken

from conftest import byte_tokenizer
from tokenizer import load_tokenizer, read_tokenizer, save_tokenizer, spell, token_bytes, tokenizer_in


def test_any_encoding_comes_back_from_its_file_unchanged(tmp_path):
    """Shuffled byte ids, merges, unused ids, several special tokens: all as in published encodings."""
    order = [b for b in range(256) if chr(b).isprintable() and b != 32]
    order += [b for b in range(256) if b not in order]
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    ranks |= {b"he": 256, "é".encode(): 257, b"\xc3\xa9\xff": 259, b" th": 261, b'"\n\x7f': 262}
    gpt2_like = tiktoken.Encoding("gpt2-like", pat_str=r"'s|\p{L}+|[^\p{L}]+", mergeable_ranks=ranks,
                                  special_tokens={"<|endoftext|>": 300, "<|pad|>": 258})
    for encoding in (gpt2_like, byte_tokenizer(256)):
        save_tokenizer(encoding, tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        for attribute in ("name", "_pat_str", "_mergeable_ranks", "_special_tokens", "n_vocab"):
            assert getattr(loaded, attribute) == getattr(encoding, attribute)
        assert loaded.encode_ordinary("the été's\n🎉") == encoding.encode_ordinary("the été's\n🎉")


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"tokens": 3}', '{"name": "x", "pattern": "(", "special_tokens": {}, "tokens": ["a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {}, "tokens": ["a", "a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {"e": 0}, "tokens": ["a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {"e": -1}, "tokens": ["a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {}, "tokens": [[999]]}',
    '{"name": "x", "pattern": ".", "special_tokens": {}, "tokens": [7]}',
    '{"name": "x", "pattern": "", "special_tokens": {}, "tokens": ["a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {"": 1}, "tokens": ["a"]}',
    '{"name": "x", "pattern": ".", "special_tokens": {"e": 2147483648}, "tokens": ["a"]}',
    pytest.param('{"tokens": ' + "[" * 10**5, id="nested")])
def test_a_malformed_tokenizer_file_is_a_value_error(tmp_path, text):
    """load_tokenizer says in a sentence which file is wrong; a missing file stays a FileNotFoundError."""
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError):
        load_tokenizer(path)
    path.write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer that prepare.py wrote") as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_the_digest_is_that_of_the_files_bytes(tmp_path):
    """Not of the text that Python reads, in which line ends of another system would be gone."""
    path = tokenizer_in(tmp_path)
    for data in (b"{}\n", b"{}\r\n", "é".encode()):
        with open(path, "wb") as f:
            f.write(data)
        assert read_tokenizer(path) == (data.decode(), hashlib.sha256(data).hexdigest())


def test_every_token_has_a_spelling_on_one_line():
    """White space that stands alone is shown by signs, what is no character by a replacement for one, and
    what would move the cursor or turn the line around by its escape."""
    tokens = [b"a b", b" ", b"\n", b"\n" + b" " * 8, b"\xff", b"')\n", b"\t", b"  ", b"\r\n", b"\x1b[1m",
              "é中\u202e".encode()]
    encoding = tiktoken.Encoding("x", pat_str=r"[\s\S]", special_tokens={"<|endoftext|>": 12},
                                 mergeable_ranks={token: i for i, token in enumerate(tokens)})
    assert [spell(encoding, i) for i in range(11)] == [
        "a b", "␣", "⏎", "⏎␣×8", "\ufffd", "')⏎", "⇥", "␣␣", "\\r⏎", "\\x1b[1m", "é中\\u202e"]
    assert spell(encoding, 11) == "\ufffd" and spell(encoding, 12) == "<|endoftext|>"
    assert token_bytes(encoding, 4) == b"\xff" and token_bytes(encoding, 11) == "\ufffd".encode()
