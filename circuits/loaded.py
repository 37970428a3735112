"""A trained model with all that it takes to ask it something: its tokenizer, its data, its device; and a
circuit of it, from circuit.json."""
import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

import runs
from circuits.nodes import Nodes, means_over, weights_between
from configurator import fail, one_line, read_json
from model import GPT
from tokenizer import load_tokenizer, tokenizer_in


@dataclass
class Loaded:
    """What `load` returns. The model is in eval mode, on the device of `process`, and needs no gradient."""

    model: GPT
    tokenizer: tiktoken.Encoding
    data: runs.Data
    process: runs.Process
    path: str  # of the checkpoint
    sha256: str  # of the checkpoint
    step: int
    dataset: str

    def encode(self, text):
        """The token ids of a text, a list that begins with <|endoftext|>, as in the tasks of templates."""
        return [self.tokenizer.eot_token, *self.tokenizer.encode(text, disallowed_special=())]

    def nodes(self, ablation="mean", windows=1024):
        """The nodes of the model, with their means over `windows` evenly spaced windows of train."""
        T = self.model.config.block_size
        starts = np.linspace(0, len(self.data.train) - T - 1, windows).astype(int)
        idx, _ = runs.windows(self.data.train, starts, T, self.process)
        return Nodes(self.model, *means_over(self.model, idx), ablation)


def load(out_dir, checkpoint="ckpt.pt", device="auto"):
    """Open the model that train.py left in `out_dir`, and the data it was trained on. Ends the script with
    one line if either is missing or does not fit."""
    process = runs.this_process(device, "float32")
    saved, model, data = runs.load_run(out_dir, checkpoint)
    path = os.path.join(out_dir, checkpoint)
    with open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    dataset = saved["settings"]["dataset"]
    tokenizer = load_tokenizer(tokenizer_in(os.path.join("data", dataset)))
    model.to(process.device).requires_grad_(False)
    return Loaded(model, tokenizer, data, process, path, sha256, saved["step"], dataset)


@contextmanager
def record_at(path):
    """What circuit.json holds, a dict, for a `with` block that makes something of it. What is wrong with the
    file, however deep in it, ends the script with one line."""
    try:
        record = read_json(path)
        if record["format"] != 2:
            raise ValueError(f"its format is {record['format']}, not 2")
        yield record
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        fail(f"cannot use circuit={path!r} ({one_line(e)}): give a circuit.json of circuit.py")


def circuit_of(record, model):
    """The circuit of a circuit.json in its model: the model's nodes, with edges for all weights between two
    of the kept ones, and the gates."""
    means, reads = ({site: torch.tensor(values) for site, values in record[key].items()}
                    for key in ("means", "reads"))
    between = [edge[:4] for edge in weights_between(model, record["nodes"])]
    nodes, needed = Nodes(model, means, reads, edges=between), set(map(tuple, record["edges"]))
    gates = torch.zeros(nodes.number)
    for site, channels in record["nodes"].items():
        gates[[nodes.places[site] + channel for channel in channels]] = 1
    gates[nodes.nodes:] = torch.tensor([float(edge in needed) for edge in between])
    return nodes, gates
