"""Write the tasks of templates, and the hard inputs of quotes: every file of this folder that holds prompts.

    python -m tasks.make
    python -m tasks.make --tokenizer=data/python_stdlib/tokenizer.json    # checked against a tokenizer

Prompts come in pairs that differ in what decides the answer and, with the tokenizer of the quickstart, end
in the same token: the bigram table cannot tell them apart. Held-out prompts are made of other words. For a
task of your own add a function that returns the two prompts of a pair and their answers, and a line in
TEMPLATES.
"""
import json
import os
import random

from configurator import configure, ends_explained, fail
from tokenizer import load_tokenizer

tokenizer = ""  # the path of a tokenizer.json, which the prompts are checked against; '': no check

FOLDER = os.path.dirname(__file__)
PAIRS = {"prompts": 400, "held_out": 120}
LONGEST = 60  # tokens of a hard prompt: the quickstart reads 64
NAMES = {
    "prompts": "other msg node func result value source obj line type count index item key file start code "
               "data end size state mode args name parser error match string length field pattern session "
               "task queue",
    "held_out": "prefix child path filename module option text token match group root pos char time user "
                "col loop event thread config command version url block frame handler"}
IN_BRACES = {  # names that are the same token after a brace and after a bracket
    "prompts": "node line count key end size state args error info match method",
    "held_out": "text buffer root char row col level time host user message header"}
# of a circuit that was chosen on few words much is idle on these alone
WORDS = {
    "prompts": "a all an and argument arguments as at attribute be but by call can cannot char code "
               "connection could date default does end error expected exit field file for found from "
               "function get has have if in index input integer invalid is it key keyword length less "
               "line list make match may message method missing module must name negative new no not "
               "number of on one open option or out parameter path positive process range read required "
               "return same server should size start state support than that the this time timeout to "
               "too tuple type unexpected unknown use used user version when with write wrong",
    "held_out": "after already any before between bytes cache class config data dict directory each "
                "either empty environment event exception failed first format group handle header host "
                "items last local loop mode more object only other package pattern pipe port queue "
                "result root second section sequence set socket source stream string table target test "
                "text thread token unable until value was where which without"}
CALLS = {"prompts": ("self.fail(", "parser.error(", "print(", "raise ValueError(", "warnings.warn(",
                     "raise RuntimeError(", "logging.info(", "self._log(", "sys.stdout.write(",
                     "raise OSError(", "super().__init__(", "name = str("),
         "held_out": ("log.write(", "self.skipTest(", "raise TypeError(", "raise KeyError(", "self.send(",
                      "msg = _(")}


# ----------------------------------------------------------------------------------------------------------
# tasks of templates: a function draws a pair, ((prompt, answer), (prompt, answer)), for a part of its task

def names(draw, part, number):
    return draw.sample(NAMES[part].split(), number)


def words(draw, part):
    return " ".join(draw.sample(WORDS[part].split(), draw.randint(2, 6)))


def single_double_quote(draw, part):
    start, text = "    " + draw.choice(CALLS[part]), words(draw, part)
    return (f"{start}'{text}", "')\n"), (f'{start}"{text}', '")\n')


def string_end(draw, part):
    [name], text = names(draw, part, 1), words(draw, part)
    return (f"    {name} = '{text}", "'\n"), (f'    {name} = "{text}', '"\n')


def for_if(draw, part):
    a, b, c = names(draw, part, 3)
    return (f"def {a}({b}):\n    for {c}", " in"), (f"def {a}({b}):\n    if {c}", " is")


def for_while(draw, part):
    a, b, c = names(draw, part, 3)
    return (f"def {a}({b}):\n    for {c}", " in"), (f"def {a}({b}):\n    while {c}", ":\n")


def fstring_brace(draw, part):
    (a, b), c = names(draw, part, 2), draw.choice(IN_BRACES[part].split())
    return (f'    {a} = f"{{{c}', "}"), (f"    {a} = {b}({c}", ")")


def subscript_or_call(draw, part):
    a, b, c, d = names(draw, part, 4)
    return (f"    {a} = {b}[{c}.{d}", "]\n"), (f"    {a} = {b}({c}.{d}", ")\n")


def bracket_counting(draw, part):
    [name], some = names(draw, part, 1), ", ".join(map(str, draw.choices(range(100), k=draw.randint(2, 5))))
    return (f"    {name} = [[{some}", "]]\n"), (f"    {name} = [{some}", "]\n")


TEMPLATES = {  # what else the task's file says
    single_double_quote: {"beyond": ["quotes"]}, string_end: {"beyond": ["quotes_line"]},
    for_if: {}, for_while: {"target_loss": 0.2}, fstring_brace: {}, subscript_or_call: {}}
RELEASED = {bracket_counting: {}}  # in the released models' tokenizer, not in ours, ]] and ⏎ are one token


def template_task(pair, more):
    """A task as a dict: for each part as many pairs as PAIRS says, drawn by `pair`, no prompt twice."""
    task = dict(more)
    for part, number in PAIRS.items():
        draw, rows = random.Random(f"{pair.__name__} {part}"), {}
        while len(rows) < 2 * number:  # the lists of words above must be long enough for this to end
            (a, to_a), (b, to_b) = pair(draw, part)
            if not {a, b} & rows.keys():
                rows |= {a: [a, to_a, to_b], b: [b, to_b, to_a]}
        task[part] = list(rows.values())
    return task


# ----------------------------------------------------------------------------------------------------------
# hard inputs of quotes: which of ') and ") closes the string that is open at the end?

ENDS = ("can not open the file", "expected the name of a module", "this is not a type",
        "no value in the list", "the end of the line", "read the data from the path",
        "only a class can be a key", "the size must be a number")
# {q} is the quote of the open string, {o} the other one, {end} the end of its text
FAMILIES = {
    "a pair of the other kind inside": "print({q}the {o}name{o} is: {end}",
    "an earlier string of the other kind": "print({o}name{o}, {q}{end}",
    "a nested call of the other kind": "print(data.get({o}name{o}), {q}{end}",
    "two earlier strings of the other kind": "print({o}name{o}, {o}value{o}, {q}{end}",
    "an earlier line of the other kind": "name = {o}value{o}\nprint({q}{end}",
    "prefix f": "print(f{q}{end}",
    "prefix b": "print(b{q}{end}",
    "prefix r": "print(r{q}{end}",
    "in a list inside the call": "print([name, str({q}{end}",
    "after a comment with an apostrophe": "# don't open it here\nprint({q}{end}",
    "after a docstring": "{o}{o}{o}Open the file.{o}{o}{o}\nprint({q}{end}",
}
# these two have other words for either quote
ONCE = {"'": "print('the 5\" disk: {end}", '"': 'print("don\'t: {end}'}
ESCAPED = {"'": "print('don\\'t: {end}", '"': 'print("the 5\\" disk: {end}'}


def quotes_hard():
    """{"families": {name: [[prompt, answer, other answer], ...]}}, half of the prompts for either quote."""
    templates = {"the other quote inside, once": ONCE, "an escaped quote of the same kind": ESCAPED,
                 **{name: dict.fromkeys("'\"", text) for name, text in FAMILIES.items()}}
    return {"families": {name: [
        [of[q].format(q=q, o=o, end=end), f"{q})\n", f"{o})\n"] for end in ENDS for q, o in ("'\"", "\"'")]
        for name, of in templates.items()}}


# ----------------------------------------------------------------------------------------------------------
# files

def lines(prompts):
    return "[\n  " + ",\n  ".join(map(json.dumps, prompts)) + "]"


def files():
    """The text of each file, by its name: what is short on one line, a prompt a line."""
    found = {}
    for pair, more in (TEMPLATES | RELEASED).items():
        entries = template_task(pair, more).items()
        parts = [f'"{key}": {lines(value) if key in PAIRS else json.dumps(value)}' for key, value in entries]
        found[f"{pair.__name__}.json"] = "{" + ",\n ".join(parts) + "}\n"
    families = quotes_hard()["families"].items()
    parts = ",\n ".join(f'{json.dumps(name)}: {lines(prompts)}' for name, prompts in families)
    found["quotes_hard.json"] = f'{{"families": {{\n {parts}}}}}\n'
    return found


def complaints(encoding):
    """Yield a line for each answer that is no single token, each pair that ends in two different tokens, and
    each hard prompt that is too long."""
    def ids(text):
        return encoding.encode_ordinary(text)
    for pair, more in TEMPLATES.items():
        task = template_task(pair, more)
        for a, b in (pair for part in PAIRS for pair in zip(task[part][::2], task[part][1::2], strict=True)):
            yield from (f"{answer!r} is no single token" for answer in a[1:] if len(ids(answer)) != 1)
            if ids(a[0])[-1] != ids(b[0])[-1]:
                yield f"{a[0]!r} and {b[0]!r} end in different tokens"
    for name, prompts in quotes_hard()["families"].items():
        for prompt, *answers in prompts:
            yield from (f"{answer!r} is no single token" for answer in answers if len(ids(answer)) != 1)
            if len(ids(prompt)) > LONGEST or prompt.split()[-1] not in encoding.decode(ids(prompt)[-1:]):
                yield f"{name}: {prompt!r} has more than {LONGEST} tokens, or does not end in a word"


@ends_explained()
def main():
    configure(globals())
    try:
        if tokenizer:
            problem = next(complaints(load_tokenizer(tokenizer)), None)
            if problem:
                fail(f"with {tokenizer}, {problem}")
        for name, text in files().items():
            with open(os.path.join(FOLDER, name), "w", encoding="utf-8", newline="\n") as f:
                f.write(text)
            print(f"wrote {os.path.join(FOLDER, name)}")
    except (OSError, ValueError) as e:
        fail(f"cannot make the tasks: {e}")


if __name__ == "__main__":
    main()
