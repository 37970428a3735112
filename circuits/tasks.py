"""Tasks: a choice between two answers of one token each, read from tasks/*.json, and made into contexts.

A task is one of two kinds. {"answers": [text, text], "contains": text} is a task of natural text: its
contexts are the places of the data at which one of the answers comes next. {"prompts": [[prompt, answer,
other answer], ...], "held_out": [...]} has contexts of its own. Both may have a "target_loss", in nats, and
list other tasks whose contexts a circuit meets "beyond" its own; {"families": {name: prompts}} is such a
list of hard inputs, by kind.
"""
import difflib
import hashlib
import itertools
import os
from dataclasses import dataclass

import numpy as np
import torch

from circuits.loaded import Loaded
from circuits.nodes import Contexts
from configurator import one_line, read_json
from runs import windows
from tokenizer import one_token

TARGET = 0.15  # the paper's
FEWEST = 16  # contexts that a task must have to learn and choose by, and as many to judge by
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tasks")
KINDS = ({"answers", "contains"}, {"prompts", "held_out"}, {"families"})
ALSO = {"target_loss", "beyond"}


def path_of(name, beside="."):
    """The file of a task: a path, with .json or without, from the folder `beside`; or a name in tasks/, with
    that folder or without."""
    name = os.path.expanduser(name)
    name = name if name.endswith(".json") else f"{name}.json"
    found = os.path.join(beside, name)
    return found if os.path.exists(found) else os.path.join(FOLDER, name.removeprefix("tasks/"))


def read_task(name, tokenizer, beside="."):
    """The task of `path_of(name, beside)`, a dict, with its tokens as ids, its "name", "path" and "sha256".

    Raises ValueError, in one sentence, if the file is no task of this tokenizer.
    """
    path = path_of(name, beside)
    try:
        with open(path, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        spec = read_json(path)
        spec = with_ids(spec, tokenizer) | {
            "target_loss": float(spec.get("target_loss", TARGET)), "path": path,
            "name": os.path.splitext(os.path.basename(path))[0], "sha256": sha256}
    except FileNotFoundError as e:
        raise ValueError(not_found(name, beside)) from e
    except OSError as e:
        raise ValueError(f"cannot read the task {path} ({e.strerror}): choose another") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        reason = e if type(e) is ValueError else one_line(e)
        raise ValueError(f'{path} is no task ({reason}): it needs {{"answers": [text, text]}}, or '
                         '{"prompts": [[prompt, answer, other answer], ...], "held_out": [...]}') from e
    return spec


def not_found(name, beside):
    """That there is no such task, with the closest name in tasks/ or, of a path, where it was looked for."""
    if name.endswith(".json") or os.path.dirname(name.removeprefix("tasks/")):
        path = os.path.abspath(os.path.join(beside, os.path.expanduser(name)))
        path += "" if path.endswith(".json") else ".json"
        return f"no task {path}: give the path of a JSON file, or a name in {FOLDER}"
    name = name.removeprefix("tasks/")
    names = sorted(os.path.splitext(file)[0] for file in os.listdir(FOLDER) if file.endswith(".json"))
    [close] = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return f"no task {name!r}: the closest that exists is {close!r}; one of your own is given by its path"


def with_ids(spec, tokenizer):
    """A task as it stands in its file, checked, and its texts as ids; ValueError and the like if it is none.

    Of natural text: "pair", two ids. Else prompts (ids, [right, other]).
    """
    kind = next((kind for kind in KINDS if kind & spec.keys()), KINDS[0])
    if unknown := sorted(spec.keys() - kind - ALSO):
        raise ValueError(f"it has a key {unknown[0]!r}, which does not exist or does not go with the others")
    if missing := sorted(kind - spec.keys() - {"contains"}):
        raise ValueError(f"{missing[0]!r} is missing")
    beyond = [str(other) for other in spec.get("beyond", ())]
    if "families" in spec:
        found = {str(family): spelled(tokenizer, prompts) for family, prompts in spec["families"].items()}
        check_answers(found)
        return {"beyond": beyond, "families": found}
    if "answers" in spec:
        answers = spec["answers"]
        if type(answers) is not list or len(answers) != 2 or not isinstance(spec.get("contains", ""), str):
            raise ValueError("a list of two answers, and a text that a context contains")
        first, second = answers
        if first == second:
            raise ValueError("two different answers")
        pair = [one_token(tokenizer, first), one_token(tokenizer, second)]
        return {"pair": pair, "contains": spec.get("contains", ""), "beyond": beyond}
    found = {part: spelled(tokenizer, spec[part]) for part in ("prompts", "held_out")}
    if {tuple(ids) for ids, _ in found["prompts"]} & {tuple(ids) for ids, _ in found["held_out"]}:
        raise ValueError("held_out has prompts that are among prompts: remove them")
    check_answers(found)
    return found | {"beyond": beyond}


def check_answers(found):
    """ValueError unless the two answers to each prompt of the lists in this dict are different."""
    if any(right == other for prompts in found.values() for _, (right, other) in prompts):
        raise ValueError("two different answers to each prompt")


def spelled(tokenizer, prompts):
    """Prompts [text, right answer, other answer] as (ids, [right, other])."""
    return [([tokenizer.eot_token, *tokenizer.encode(prompt, disallowed_special=())],
             [one_token(tokenizer, right), one_token(tokenizer, other)]) for prompt, right, other in prompts]


def joined_otherwise(spec, tokenizer):
    """Why a model may fail at a task of prompts, in a few words: most of them, with the right answer, are
    other tokens in running text, which is what models read. '' if that is not so."""
    prompts = [(ids[1:], right) for ids, (right, _) in spec.get("prompts", ())]
    strange = [(ids, right) for ids, right in prompts if [*ids, right] != tokenizer.encode(
        tokenizer.decode([*ids, right]), disallowed_special=())]
    if 2 * len(strange) <= len(prompts):
        return ""
    prompt, answer = map(tokenizer.decode, (strange[0][0], [strange[0][1]]))
    space = ": let the prompts end before their last space, and the answers begin with it"
    return (f"{len(strange)} of its {len(prompts)} prompts, such as {prompt!r} with {answer!r}, are other "
            f"tokens where text runs on{space if prompt.endswith(' ') else ''}")


@dataclass
class Source:
    """Makes the contexts of tasks from a model's data: at most so many of each kind, drawn by `seed`.

    What has too few of them is a ValueError, in one sentence.
    """

    loaded: Loaded
    learning: int = 9600
    choosing: int = 512
    judging: int = 1024
    seed: int = 1337

    @property
    def block_size(self):
        return self.loaded.model.config.block_size

    @property
    def device(self):
        return self.loaded.process.device

    def of_text(self, tokens, split, spec, most):
        """Up to `most` contexts of a natural task in `tokens`, either answer as often, in random order."""
        rng, tokenizer = np.random.default_rng(self.seed), self.loaded.tokenizer
        found, wanted, length = [], spec["contains"].encode(), self.block_size
        for answer in spec["pair"]:
            places = rng.permutation(np.flatnonzero(tokens[length:] == answer)) + length
            if wanted:
                places = (p for p in places if wanted in tokenizer.decode_bytes(tokens[p - length:p]))
            found.append([*itertools.islice(places, most // 2)])
        n = min(map(len, found))
        if n < FEWEST:
            shortest = tokenizer.decode([spec["pair"][min((0, 1), key=lambda c: len(found[c]))]])
            with_text = f" that contain {spec['contains']!r}" if wanted else ""
            raise ValueError(f"{split} has {n} contexts of {length} tokens before {shortest!r}{with_text}, "
                             f"fewer than {FEWEST}: choose a more frequent answer, or another task")
        positions = np.stack([places[:n] for places in found], axis=1).flatten()
        idx, _ = windows(tokens, positions - length, length, self.loaded.process)
        answers = torch.tensor(spec["pair"])
        answers = torch.stack([answers, answers.flip(0)]).repeat(n, 1)
        last = torch.full((2 * n,), length - 1)
        return Contexts(idx, *(t.to(self.device) for t in (last, answers, torch.from_numpy(positions))))

    def of_prompts(self, prompts, part):
        """Those of a list of (ids, answers), in random order: as many of which the right answer has the
        lower id of the two as of which it has the higher."""
        longest = max((len(ids) for ids, _ in prompts), default=0)
        shuffled = [prompts[i] for i in np.random.default_rng(self.seed).permutation(len(prompts))]
        lower = np.array([right < other for _, (right, other) in shuffled], dtype=bool)
        n = min(lower.sum(), (~lower).sum())
        prompts = [shuffled[i] for i in sorted([*np.flatnonzero(lower)[:n], *np.flatnonzero(~lower)[:n]])]
        if len(prompts) < FEWEST:
            raise ValueError(f"the task has {len(prompts)} {part} if either answer is to be right as often, "
                             f"fewer than {FEWEST}: write more")
        if longest > self.block_size:
            raise ValueError(f"a prompt of the task has {longest} tokens, with the <|endoftext|> before it, "
                             f"more than the model's window of {self.block_size}: shorten it")
        return Contexts.of(prompts, self.device)

    def judging_set(self, spec):
        """The contexts that a task is judged by: of val, or its held-out prompts."""
        if "pair" in spec:
            return self.of_text(self.loaded.data.val, "val", spec, self.judging)
        return self.of_prompts(spec["held_out"], "held-out prompts")

    def three_sets(self, spec):
        """Contexts to learn masks on, to choose the size on, to judge by; either answer right as often."""
        if "families" in spec:
            raise ValueError(f"{spec['name']} is a list of hard inputs, which a task has beyond its own")
        if "pair" in spec:
            train = self.of_text(self.loaded.data.train, "train", spec, self.choosing + self.learning)
        else:
            train = self.of_prompts(spec["prompts"], "prompts")
        half, sides = min(self.choosing, len(train) // 3) // 2, train.sides()
        nth = torch.where(sides > 0, (sides > 0).cumsum(0), (sides < 0).cumsum(0))  # of its side, from 1
        choosing = nth <= half
        return train[~choosing], train[choosing], self.judging_set(spec)

    def beyond(self, spec, judging, unseen=None):
        """Contexts that a circuit was not made for: name -> Contexts.

        The task's own in random order; those of the tasks that it lists as "beyond", a family at a time; of
        `unseen` data (a runs.Data), if there is any and the task is one of natural text; and any places of
        val, where the first two answers compete. Returned beside it: those of the families alone.
        """
        found, hard = {"random order": judging.in_random_order(self.seed)}, {}
        for name in spec["beyond"]:
            other = read_task(name, self.loaded.tokenizer, os.path.dirname(spec["path"]))
            if "families" in other:
                hard |= {f"{other['name']}: {family}": self.of_prompts(prompts, f"prompts of {family}")
                         for family, prompts in other["families"].items()}
                found |= hard
            else:
                found[other["name"]] = self.judging_set(other)
        if unseen and "pair" in spec:
            found["unseen files"] = self.of_text(unseen.val, "the unseen data's val", spec, self.judging)
        T, val = self.block_size, self.loaded.data.val
        starts = np.random.default_rng(self.seed).integers(len(val) - T, size=self.judging)
        idx, _ = windows(val, starts, T, self.loaded.process)
        last, answers = torch.full((len(idx),), T - 1, device=idx.device), judging.answers[0].sort().values
        return found | {"ordinary text": Contexts(idx, last, answers.expand(len(idx), 2))}, hard


def contexts_record(contexts, answers):
    """The contexts as circuit.json keeps them: for each answer its positions in val.bin, or the ids of its
    prompts. `answers`: the pair of a natural task, else None."""
    first = contexts.answers[:, 0] == answers[0] if answers else contexts.sides() > 0
    groups = [rows.nonzero()[:, 0].tolist() for rows in (first, ~first)]
    if contexts.positions is not None:
        return {"split": "val", "positions": [contexts.positions[rows].tolist() for rows in groups]}
    ids = [contexts.idx[row, :contexts.last[row] + 1].tolist() for row in range(len(contexts))]
    return {"split": "held_out", "ids": [[ids[row] for row in rows] for rows in groups],
            "answers": [contexts.answers[rows].tolist() for rows in groups]}


def recorded_contexts(record, data, block_size):
    """The contexts of a circuit.json: a list of (ids, [right, other]), either answer the right one in turn.

    ValueError if `data`, a runs.Data, is not the text from which they are.
    """
    of = record["contexts"]
    if of["split"] == "val":
        pair, sides = record["answer_ids"], []
        for positions, answers in zip(of["positions"], (pair, pair[::-1]), strict=True):
            if not all(block_size <= p < len(data.val) and data.val[p] == answers[0] for p in positions):
                raise ValueError(f"its contexts are not in this data: it was found on {record['dataset']}")
            sides.append([(data.val[p - block_size:p].tolist(), answers) for p in positions])
    else:
        sides = [zip(*side, strict=True) for side in zip(of["ids"], of["answers"], strict=True)]
    return [context for pair in itertools.zip_longest(*sides) for context in pair if context]


def prompts_record(families):
    """Families of hard inputs as circuit.json keeps them: name -> [[ids, right, other], ...]."""
    return {name: [[contexts.idx[row, :last + 1].tolist(), *contexts.answers[row].tolist()]
                   for row, last in enumerate(contexts.last.tolist())]
            for name, contexts in families.items()}
