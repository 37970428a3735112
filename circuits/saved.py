"""A circuit that circuit.py saved, to be asked again: on any text, whole or with a part of it less.

    from circuits import load_circuit
    c = load_circuit("out/quickstart/circuits/quotes/circuit.json")
    c.choice("print('hello", fitted=True)               # its two answers and what it gives them
    c.without().logits("print('hello")                  # the model without the circuit
    c.minus_edge("0.attn.attn_in", 3, "0.attn.attn_k", 97).result()["loss"]
"""
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from circuits.controls import result
from circuits.loaded import Loaded, load
from circuits.nodes import Contexts, Nodes, weights_between
from circuits.search import apply_fit
from circuits.tasks import recorded_contexts
from configurator import fail, one_line, read_json

FORMAT = 2  # of circuit.json


@dataclass(repr=False)
class Circuit:
    """What `load_circuit` returns: a circuit in its model, as gates of its circuits.nodes.Nodes."""

    run: Loaded
    record: dict  # all of circuit.json
    nodes: Nodes
    gates: torch.Tensor
    is_rest: bool = False  # as `without` returns it

    def __repr__(self):
        return (f"<circuit of {self.record['task']}: {sum(map(len, self.kept.values()))} nodes, "
                f"{len(self.edges)} edges, in {self.run.path}>")

    @property
    def kept(self):
        """Its nodes: site -> list of channels."""
        return self.nodes.kept(self.gates)

    @property
    def edges(self):
        """Its edges: (site read, channel, site written, channel, weight)."""
        return self.nodes.edges_in(self.gates)

    def logits(self, ids):
        """Logits (vocab_size) of what comes after a text or ids, with all else of the model ablated."""
        return self.read(ids)[0]

    def read(self, ids):
        """Logits (vocab_size) of what comes after a text or ids, and the nodes as they are in the circuit:
        site -> (T, channels), of the last block after its attention (1, channels), the last token's."""
        idx, nodes = self.run.batch(ids), {}
        last = torch.tensor([idx.size(1) - 1], device=idx.device)
        logits = self.nodes.next_logits(Contexts(idx, last, idx[:, :0]), self.gates, watch=nodes.__setitem__)
        return logits[0], {site: x[0] for site, x in nodes.items()}

    def scale_and_shift(self, fitted):
        """Scale and shift of the margin of two logits: of the circuit's fit, or (1, 0). ValueError if the
        fit is to be that of the rest of the model, which has none."""
        if fitted and self.is_rest:
            raise ValueError("the fit is of the circuit, not of the rest of the model")
        return (self.record["scale"], self.record["shift"]) if fitted else (1.0, 0.0)

    def choice(self, ids, fitted=False):
        """{answer: probability} after a text or ids, of the two answers alone; `fitted`: with the scale and
        the shift of its logits that were fitted when it was found."""
        low, high = sorted(self.record["answer_ids"])
        (scale, shift), logits = self.scale_and_shift(fitted), self.logits(ids)
        p = torch.sigmoid(scale * (logits[low] - logits[high]) + shift).item()
        return {self.run.tokenizer.decode([low]): p, self.run.tokenizer.decode([high]): 1 - p}

    def contexts(self):
        """The Contexts that it was judged by. ValueError if the run has other data than it was found on."""
        run = self.run
        found = recorded_contexts(self.record, run.data, run.model.config.block_size)
        return Contexts.of(found, run.process.device)

    def result(self, contexts=None, fitted=False):
        """Its loss and accuracy, a dict, on Contexts; by default on those that it was judged by. `fitted`
        as in `choice`."""
        fit, contexts = self.scale_and_shift(fitted), contexts or self.contexts()
        return result(apply_fit(self.nodes.judge(contexts, self.gates), contexts.sides(), *fit))

    def minus(self, site, channel):
        """The circuit without one of its nodes."""
        if channel not in self.kept.get(site, ()):
            raise ValueError(f"{site} {channel} is no node of the circuit: see its `kept`")
        return self.less(self.nodes.places[site] + channel)

    def minus_edge(self, read, i, written, o, weight=None):
        """The circuit without one of its edges, from channel i of one site to channel o of another. The
        weight, which an entry of `edges` has too, is ignored."""
        edge = (read, i, written, o)
        if edge not in [there[:4] for there in self.edges]:
            raise ValueError(f"there is no edge from {read} {i} to {written} {o} in it: see its `edges`")
        nodes, gates = self.nodes, self.gates
        if edge not in nodes.edges:  # it is one of the rest of the model
            nodes, gates = nodes.with_edges([*nodes.edges, edge]), torch.cat([gates, gates.new_ones(1)])
        return replace(self, nodes=nodes, gates=gates).less(nodes.nodes + nodes.edges.index(edge))

    def less(self, place):
        gates = self.gates.clone()
        gates[place] = 0
        return replace(self, gates=gates)

    def without(self):
        """The model without the circuit: its nodes ablated, all others and all edges as they are."""
        return replace(self, gates=self.nodes.others(self.gates), is_rest=True)


@contextmanager
def record_at(path):
    """What circuit.json holds, a dict, for a `with` block that makes something of it. What is wrong with the
    file, however deep in it, ends the script with one line."""
    try:
        record = read_json(path)
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']}, not {FORMAT}")
        record.setdefault("cut", [])  # not in files of before there were such edges
        yield record
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        reason = (e.strerror if isinstance(e, OSError) and e.strerror else f"it lacks {e}"
                  if type(e) is KeyError else e if type(e) is ValueError else one_line(e))
        fail(f"cannot use circuit={path!r} ({reason}): give a circuit.json of circuit.py")


def circuit_of(record, model):
    """The circuit of a circuit.json in its model: the model's nodes, with edges for all weights between two
    of the kept ones and those that are "cut", and the gates."""
    device = next(model.parameters()).device
    means, reads = ({site: torch.tensor(values, device=device) for site, values in record[key].items()}
                    for key in ("means", "reads"))
    between = [edge[:4] for edge in weights_between(model, record["nodes"])]
    between += map(tuple, record["cut"])
    nodes, needed = Nodes(model, means, reads, edges=between), set(map(tuple, record["edges"]))
    gates = torch.zeros(nodes.number, device=device)
    for site, channels in record["nodes"].items():
        gates[[nodes.places[site] + channel for channel in channels]] = 1
    gates[nodes.nodes:] = torch.tensor([float(edge in needed) for edge in between])
    return nodes, gates


def run_of(record, path, run=None, device="auto"):
    """The model of a circuit.json, a Loaded: `run`, or else what is two folders above the file's, or what it
    names. ValueError if it is another."""
    if run is None:
        out_dir, checkpoint = os.path.split(record["model"])
        above = os.path.normpath(os.path.join(os.path.dirname(path), "..", ".."))
        out_dir = above if os.path.exists(os.path.join(above, checkpoint)) else out_dir
        run = load(out_dir, checkpoint, device, record["dataset"])
    if record["sha256"] != run.sha256:
        raise ValueError(f"it is of another checkpoint than {run.path}: run circuit.py again")
    return run


def load_circuit(path, run=None, device="auto"):
    """The circuit of a circuit.json, in its model: `run`, or else a model of its own, from two folders above
    the file's. What is done to another model, such as `run.frozen`, is not done to this one.

    Raises UserError if the file is none, or is of another model, or the model cannot be opened.
    """
    path = os.path.expanduser(os.fspath(path))
    with record_at(path) as record:
        run = run_of(record, path, run, device)
        return Circuit(run, record, *circuit_of(record, run.model))
