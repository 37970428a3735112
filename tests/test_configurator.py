"""How settings are read: flags and config files apply in the order given, each value gets the type of the
setting's default, and whatever cannot be read ends the script with one line and changes nothing.
"""
import ast
import contextlib
import importlib
import io
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import configurator
from configurator import UserError, adopt, configure, difference, ends_explained, fail, read_json
from conftest import REPO
from test_sparsity import few


def script():
    """The globals of a script with a setting of each type, and with what is no setting."""
    return {"d_model": 64, "learning_rate": 1e-3, "use_bias": True, "start": "x",
            "CONSTANT": 3, "_private": 4, "__name__": "script", "function": print, "module": os}


def configured(*argv):
    """The settings after configure(), and the names that it says were set."""
    settings = script()
    chosen = configure(settings, [str(arg) for arg in argv])
    changes = {name: settings[name] for name in chosen}
    assert settings == script() | changes
    return changes


@pytest.fixture
def error_of(capsys):
    """error_of(*argv): the one line with which configure() ends the script, having changed nothing."""

    def run(*argv):
        settings = script()
        with pytest.raises(SystemExit) as ended:
            configure(settings, [str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and settings == script() and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err

    return run


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="config.py"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return write


@pytest.mark.parametrize("argument, expected", [
    ("--d_model=256", {"d_model": 256}), ("--d_model=-1", {"d_model": -1}),
    ("--learning_rate=1/64", {"learning_rate": 1 / 64}), ("--learning_rate=3", {"learning_rate": 3.0}),
    ("--learning_rate=1.6e-3", {"learning_rate": 1.6e-3}), ("--learning_rate=.5", {"learning_rate": 0.5}),
    ("--use_bias=False", {"use_bias": False}), ("--use_bias=TRUE", {"use_bias": True}),
    ("--start=a=b", {"start": "a=b"}), ("--start=", {"start": ""}), ("--start=1/64", {"start": "1/64"}),
    ("--start=--d_model=3", {"start": "--d_model=3"}), ("--start=a\n  b", {"start": "a\n  b"}),
])
def test_a_flag_is_read_as_its_settings_type(argument, expected):
    """A fraction or an int is welcome for a float; text is taken as it is, whatever it contains."""
    assert repr(configured(argument)) == repr(expected)


def test_a_path_may_begin_with_the_home_folder(monkeypatch, config_file):
    """In a flag and in a file ~ becomes the home folder; in a setting that is no path it stays."""
    monkeypatch.setenv("HOME", str(config_file("d_model = 7").parent))
    assert configured("~/config.py") == {"d_model": 7}
    monkeypatch.setenv("HOME", "/home/me")
    for value in ("~", "~/c/*.txt"):
        settings = {"out_dir": "out", "dataset": "x", "circuit": "", "checkpoint": "ckpt.pt", "start": ""}
        path = config_file(f"out_dir = {value!r}")
        configure(settings, [str(path), *(f"--{name}={value}" for name in settings if name != "out_dir")])
        assert settings == dict.fromkeys(settings, value.replace("~", "/home/me")) | {"start": value}


def test_files_and_flags_apply_in_the_order_given(config_file):
    """The last one wins, be it file or flag; a flag alone needs no file."""
    a = config_file("d_model = 1\nstart = 'a'\n", "a.py")
    b = config_file("d_model = 2\nlearning_rate = 1\n", "b.py")
    assert configured(a, b) == {"d_model": 2, "start": "a", "learning_rate": 1.0}
    assert configured(b, a)["d_model"] == 1
    assert configured(a, "--d_model=3", b)["d_model"] == 2
    assert configured(a, b, "--d_model=3")["d_model"] == 3
    assert configured("--d_model=3", "--d_model=4") == {"d_model": 4}
    assert configured() == {}


def test_a_config_file_is_python(config_file):
    """It may compute, import and define functions; names with an underscore are its own; a float may be an
    int."""
    path = config_file("import math\nfrom math import isqrt\n_width = 16\n"
                       "def times(n):\n    return n * isqrt(_width * _width)  # é\n"
                       "d_model = times(4)\nlearning_rate = 1\nuse_bias = d_model < math.pi\n")
    expected = [("d_model", 64), ("learning_rate", 1.0), ("use_bias", False)]
    assert repr(sorted(configured(path).items())) == repr(expected)


values_of_settings = st.fixed_dictionaries({
    "d_model": st.integers(-2**63, 2**63 - 1),
    "learning_rate": st.floats(allow_nan=False, allow_infinity=False),
    "use_bias": st.booleans(), "start": st.text(st.characters(exclude_categories=["Cs"]), max_size=20)})


@few
@given(values_of_settings)
def test_any_value_survives_a_flag_and_a_file(config_file, values):
    """What is written as a flag or in a file is what the script gets."""
    assert configured(*(f"--{name}={value}" for name, value in values.items())) == values
    text = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    assert configured(config_file(text)) == values


@hypothesis_settings(few, max_examples=100)
@given(st.sampled_from(["d_model", "learning_rate", "use_bias", "start", "strat"]), st.text(max_size=20) |
       st.from_regex(r"-?[0-9]{1,3}([./e][0-9]{1,2})?|[Tt]rue|false", fullmatch=True))
def test_a_flag_of_any_text_is_read_as_its_type_or_refused(key, text):
    """Whatever stands after --key=, the setting gets a value of its type, or the script ends with status 2
    and no setting is changed."""
    settings, before = script(), script()
    try:
        configure(settings, [f"--{key}={text}"])
    except SystemExit as ended:
        assert ended.code == 2 and settings == before and key != "start"
    else:
        assert settings == before | {key: settings[key]}
        assert type(settings[key]) is type(before[key])
        if key in ("d_model", "start"):
            assert settings[key] == type(before[key])(text)


@pytest.mark.parametrize("key, closest", [
    ("d_modle", "d_model"), ("learning_rat", "learning_rate"), ("Start", "start"), ("use-bias", "use_bias"),
    ("learning", "learning_rate"), ("bias", "use_bias"), ("CONSTANT", None), ("_private", None),
    ("__name__", None), ("function", None), ("lr", None), ("", None),
])
def test_an_unknown_setting_is_an_error_that_names_the_closest(error_of, key, closest):
    """Misspelt names, a part of one, and what in the script's globals is no setting. None that is not alike
    is named."""
    error = error_of(f"--{key}=3")
    assert repr(key) in error
    assert (f"closest that exists is {closest!r}" if closest else "--help lists") in error


def test_an_unknown_setting_in_a_file_is_an_error_that_names_the_file(error_of, config_file):
    """The same as for a flag; what was right is not applied either. A function is of no setting's type."""
    path = config_file("learning_rate = 1\nd_modle = 3\n")
    error = error_of("--start=fine", path)
    assert "'d_modle'" in error and "'d_model'" in error and str(path) in error
    assert "d_model" in error_of(config_file("def d_model():\n    pass\n"))


@pytest.mark.parametrize("key, text, literal, expected", [
    ("d_model", "1.5", "1.5", "int"), ("d_model", "2.0", "2.0", "int"), ("d_model", "", "None", "int"),
    ("d_model", "big", "'big'", "int"), ("d_model", "True", "True", "int"), ("d_model", "1e3", "1e3", "int"),
    ("d_model", "1/2", "(1,)", "int"),
    ("learning_rate", "fast", "'fast'", "float"), ("learning_rate", "1/0", "'1/0'", "float"),
    ("learning_rate", "nan", "'nan'", "float"), ("learning_rate", "1e999", "'1e999'", "float"),
    ("learning_rate", "False", "False", "float"), ("learning_rate", "", "[0.1]", "float"),
    ("use_bias", "1", "1", "bool"), ("use_bias", "yes", "'yes'", "bool"), ("use_bias", "", "''", "bool"),
])
def test_a_wrong_type_names_key_value_and_type(error_of, config_file, key, text, literal, expected):
    """In a flag and in a file alike."""
    path = config_file(f"{key} = {literal}\n")
    for argument, value in ((f"--{key}={text}", text), (path, ast.literal_eval(literal))):
        error = error_of(argument)
        assert key in error and repr(value) in error and f"expected {expected}" in error
    assert str(path) in error


def test_text_is_not_made_of_a_number_in_a_file(error_of, config_file):
    """start = 3 in a file is no text: the error says so."""
    error = error_of(config_file("start = 3\n"))
    assert "start" in error and "3" in error and "expected str" in error


def test_a_number_too_large_for_a_float_is_an_error(error_of, config_file):
    """In a flag and in a file: an int that no float holds."""
    for argument in (f"--learning_rate=1{'0' * 400}", config_file(f"learning_rate = 1{'0' * 400}\n")):
        assert "learning_rate" in error_of(argument)


@pytest.mark.parametrize("value", [
    "np.float64(0.01)", "np.int32(1)", "np.bool_(True)", "Fraction(1, 2)", "(0.1,)", "[0.1]", "{0.1}",
    "{'a': 1}", "None", "torch.tensor(0.1)", "b'a'", "1j", "range(3)", "np.ones(2)", "...", "torch.float32",
    "Path('a')"])
def test_whatever_a_file_assigns_is_a_setting(error_of, config_file, value):
    """Of any kind, it is refused with its name: a misspelt one, and a setting's that has no such type."""
    imports = ("from fractions import Fraction\nfrom pathlib import Path\nimport numpy as np\nimport torch\n"
               "from numpy import sqrt\nclass Own:\n    pass\n")
    error = error_of(config_file(f"{imports}learning_rat = {value}\n"))
    assert "'learning_rat'" in error and "'learning_rate'" in error
    error = error_of(config_file(f"{imports}learning_rate = {value}\n"))
    assert "learning_rate=" in error and "expected float" in error
    assert configured(config_file(f"{imports}_own = {value}\n")) == {}


@pytest.mark.parametrize("digits", [25, 400, 701, 5000])
@pytest.mark.parametrize("key", ["d_model", "learning_rate", "d_modle"])
def test_an_int_that_is_too_long_is_an_error(error_of, config_file, key, digits):
    """Beyond 63 bits, and where Python refuses to write it. A float setting takes what a float holds."""
    for argument in (f"--{key}=1{'0' * digits}", config_file(f"{key} = 10**{digits}\n")):
        if key == "learning_rate" and digits < 300:
            assert configured(argument) == {key: 10.0**digits}
        else:
            error = error_of(argument)
            assert key in error and len(error) < 400


def test_a_path_without_sense_is_an_error(config_file, capsys):
    """One that holds a NUL, which the system takes for its end."""
    with pytest.raises(SystemExit):
        configure({"out_dir": "out"}, [str(config_file("out_dir = 'a\\0b'"))])
    assert capsys.readouterr().err.startswith("error: out_dir='a\\x00b' (in ")


@pytest.mark.parametrize("character", list("\n\r\x00\x0b\x1b\x85\u2028"))
def test_an_error_is_one_line(capsys, character):
    """Whatever the path in it: what would break or colour the line is escaped."""
    with pytest.raises(SystemExit):
        fail(f"no file a{character}b\\é")
    error = capsys.readouterr().err
    assert error == f"error: no file a{ascii(character)[1:-1]}b\\é\n" and len(error.splitlines()) == 1


def test_an_error_is_printed_once_and_only_if_a_script_runs(capsys, monkeypatch):
    """A script prints its line and ends with 2; elsewhere the exception has the sentence, and its code the
    line, for Python to print if nobody catches it. It is an error of UserError, not of Exception."""
    for is_script in (True, False):
        monkeypatch.setattr(configurator, "is_script", is_script)
        with pytest.raises(UserError) as error:
            fail("no file a\nb")
        assert str(error.value) == "no file a\nb" and not isinstance(error.value, Exception)
        assert (capsys.readouterr().err, error.value.code) == (
            ("error: no file a\\nb\n", 2) if is_script else ("", "error: no file a\\nb"))
    configure({}, [])
    assert configurator.is_script


@pytest.mark.parametrize("code, status", [
    ("configurator.fail('a')", 1), ("configurator.configure({}, [])\nconfigurator.fail('a')", 2),
    ("try:\n    configurator.fail('a')\nexcept configurator.UserError as e:\n    sys.exit(f'error: {e}')",
     1)])
def test_whoever_runs_into_an_error_reads_it_once(code, status):
    """In a script, in a program that does not catch it, and in one that does and prints it."""
    result = subprocess.run([sys.executable, "-c", f"import sys, configurator\n{code}"], text=True,
                            cwd=REPO, capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", "error: a\n")


def test_a_stdout_that_was_replaced_is_taken_as_it_is(monkeypatch):
    """In a notebook, or under contextlib.redirect_stdout, it may have no encoding to set."""
    monkeypatch.setattr(sys, "argv", ["script.py", "--d_model=7"])
    for stream in (io.StringIO(), type("Cell", (), {"write": len, "flush": len})()):
        settings = script()
        with contextlib.redirect_stdout(stream):
            assert configure(settings) == {"d_model"} and settings["d_model"] == 7


def test_a_stdout_that_is_closed_is_none(monkeypatch):
    """Python has None for it then: what is printed goes nowhere, and can be flushed."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(sys, "stdout", None)
    configure(script())
    print("into the void", flush=True)
    sys.stdout.close()


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, ""), (MemoryError(), 2, "buy some"), (SystemExit(3), 3, ""),
    (RuntimeError("CUDA out of memory. Tried"), 2, "buy some"),
    (RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"), 2, "buy some"),
    (ValueError("array is too big; `arr.size * arr.dtype.itemsize` is larger"), 2, "buy some")])
def test_a_script_ends_without_a_traceback(capsys, error, status, words):
    """When memory does not suffice it says what to do; Ctrl-C needs no words."""
    @ends_explained("buy some")
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status and words in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("size"), ValueError("n"), OSError("disk"), KeyError("x")])
def test_other_errors_stay_what_they_are(error):
    """A mistake of ours is worth its traceback."""
    @ends_explained()
    def main():
        raise error

    with pytest.raises(type(error)) as raised:
        main()
    assert raised.value is error


@pytest.mark.parametrize("text, words", [
    ("", "no JSON"), ("{", "no JSON"), ("[" * 100_000, "no JSON"), ('{"a":' * 100_000, "no JSON"),
    (b"\xff", "no JSON"), ("[1, 2]", "no JSON object, but [1, 2]"), ("null", "None"), ('"a"', "'a'"),
    ('{"a": ' + "9" * 5000 + "}", "no JSON")])
def test_json_that_is_none_is_a_value_error(config_file, text, words):
    """Whatever is in the file, in a few words."""
    with pytest.raises(ValueError, match=".") as error:
        read_json(config_file(text))
    assert words in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_json_of_an_object_is_read(config_file, tmp_path):
    """Also with the byte order mark that some editors write. A file that is not there is an OSError."""
    for mark in (b"", b"\xef\xbb\xbf"):
        assert read_json(config_file(mark + '{"é": [1.5, null]}'.encode())) == {"é": [1.5, None]}
    with pytest.raises(OSError, match="none.json"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("text, words", [
    ("raise KeyboardInterrupt\n", ["KeyboardInterrupt"]), ("exit(3)\n", ["SystemExit"]),
    ("def f():\n    f()\nf()\n", ["RecursionError"]),
    ("d_model = = 3\n", ["SyntaxError"]), ("if True:\nd_model = 3\n", ["IndentationError"]),
    ("d_model = 1 / 0\n", ["ZeroDivisionError"]), ("import no_such_module\n", ["no_such_module"]),
    ("raise ValueError('two\\nlines')\n", ["ValueError", "two lines"]),
    ("d_model = d_head\n", ["NameError", "d_head"]),
    (b"start = '\xff\xfe'\n", ["config.py"]), (b"d_model = 3\0\n", ["config.py"]),
])
def test_a_config_file_that_does_not_run_is_an_error(error_of, config_file, text, words):
    """One line that names the file and what is wrong in it, no traceback."""
    path = config_file(text)
    error = error_of(path)
    assert all(word in error for word in [str(path), *words]), error


def test_a_config_file_that_is_not_there_is_an_error(error_of, tmp_path):
    """Nor is a folder a config file."""
    assert "no_such.py" in error_of(tmp_path / "no_such.py")
    assert str(tmp_path) in error_of(tmp_path)


@pytest.mark.parametrize("argument, form", [
    ("--d_model", "--d_model=VALUE"), ("--", "--key=value"), ("-d_model=3", "--key=value"),
    ("--compile", "--key=value")])
def test_a_flag_without_a_value_is_an_error_that_says_how_to_write_it(error_of, argument, form):
    """The error shows the argument and the form that is read."""
    error = error_of(argument)
    assert repr(argument) in error and form in error


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", ["train", "circuit", "prepare", "sample"])
def test_help_lists_all_settings_as_the_file_has_them(capsys, name, flag):
    """With the docstring and the comments; nothing is set, whatever else is given."""
    module = importlib.import_module(name)
    before = configurator.settings_of(vars(module))
    with pytest.raises(SystemExit) as ended:
        configure(vars(module), [flag, "--no_such=3"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and printed.startswith(module.__doc__)
    assert configurator.settings_of(vars(module)) == before
    lines = [line.partition("=")[0] for line in printed.splitlines() if line.startswith("--")]
    assert lines == [f"--{name}" for name in before] and "--task='quotes'" not in printed


def test_only_one_process_of_a_machine_prints_the_error(monkeypatch, capsys):
    """Under torchrun the other ranks end as well, but silently."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        configure(script(), ["--zz=3"])
    assert capsys.readouterr() == ("", "")


def test_a_run_goes_on_with_its_settings_but_for_those_given():
    """The earlier run's win over the defaults, those given now win over both. What is no setting of the
    script is not added, nor is anything replaced."""
    settings = script()
    given = configure(settings, ["--d_model=7", "--start=x"])
    earlier = {"d_model": 5, "learning_rate": 0.5, "start": "y", "gone": 3, "function": 1, "CONSTANT": 4}
    adopt(settings, earlier, given)
    assert settings == script() | {"d_model": 7, "learning_rate": 0.5, "start": "x"}


def test_settings_of_an_earlier_run_are_checked(capsys):
    """They come from a file, which may hold anything."""
    with pytest.raises(SystemExit):
        adopt(script(), {"d_model": "many"}, set())
    assert "d_model='many' (of the earlier run)" in capsys.readouterr().err


def test_without_an_earlier_run_nothing_is_adopted():
    """The settings are the defaults and what was given."""
    settings = script()
    given = configure(settings, ["--d_model=7"])
    adopt(settings, {}, given)
    assert settings == script() | {"d_model": 7}


def test_the_difference_of_settings_is_written_as_flags_are():
    """By name in alphabetical order, of those that both have, but for some."""
    other = script() | {"start": "y", "d_model": 1, "use_bias": False, "gone": 3, "CONSTANT": 5}
    assert difference(script(), other) == "d_model=64, start='x', use_bias=True"
    assert difference(script(), other, but={"start"}) == "d_model=64, use_bias=True"
    assert difference(script(), script()) == difference(script(), {}) == ""
