"""The circuit of a task: nodes, gates, means and edges against plain counts; the search on a model whose
circuit is known, because its weights were set by hand; the file that is written; and what bad input gets.
"""
import json

import numpy as np
import pytest
import torch

import circuit
from circuits import sceptic
from circuits.nodes import Contexts, Nodes, count, matrices, means_over, survival
from conftest import read
from model import GPT, GPTConfig
from runs import load_checkpoint, model_of
from test_sparsity import run, some_tokens, tiny_model

T = 8
A, B, FOR_A, FOR_B = 1, 2, 3, 4  # tokens: one of A and B opens a text, and decides what comes last
CIRCUIT = {"0.attn.attn_in": [0], "0.attn.attn_v": [5], "0.attn.attn_out": [7]}


@pytest.fixture
def known():
    """A model that does the task above by three nodes, in which all else is noise that changes nothing.

    Channel 0 of the stream is positive at A and negative at B; value 5 reads it, attention to all tokens
    alike carries it to the last one, where it is written to channel 7, which unembeds to the answers.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, d_model=16, d_head=8, d_mlp=12, block_size=T, vocab_size=11,
                          activation_topk_fraction=1.0, use_bigram_table=False)).eval()
    attn, mlp = model.transformer.h[0].attn, model.transformer.h[0].mlp
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[FOR_A, 7], model.lm_head.weight[FOR_B, 7] = 1.5, -1.5
        wte = model.transformer.wte.weight
        wte.normal_()  # beside which channel 7 is not all that the final norm sees
        wte[:, 0], wte[:, 7] = 0, 0
        wte[A, 0], wte[B, 0] = 1, -1
        attn.c_attn.weight[:32], attn.c_proj.weight[7] = 0, 0  # no queries, no keys
        attn.c_attn.weight[32 + 5] = 0
        attn.c_attn.weight[32 + 5, 0], attn.c_proj.weight[7, 5] = 4, 4
        mlp.c_proj.weight[7] = 0
    return model.requires_grad_(False)


def some_contexts(n, seed=0):
    """n texts that begin with A or B, in turn, and go on with what says nothing."""
    idx = torch.from_numpy(np.random.default_rng(seed).integers(5, 11, size=(n, T)))
    is_a = torch.arange(n) % 2 == 0
    idx[:, 0] = torch.where(is_a, A, B)
    answers = torch.tensor([[FOR_A, FOR_B], [FOR_B, FOR_A]]).repeat(n // 2, 1)
    return Contexts(idx, torch.full((n,), T - 1), answers)


def nodes_of(model):
    return Nodes(model, means_over(model, some_contexts(200, seed=9).idx))


def test_gates_at_one_change_nothing():
    """Every node passes as it is, bit for bit, and the logits are the model's."""
    model = tiny_model().eval().requires_grad_(False)
    nodes = Nodes(model, means_over(model, some_tokens(5, 8)))
    contexts, seen, expected = some_contexts(6), {}, {}
    ones = torch.ones(nodes.number)
    logits = nodes.logits(contexts, ones, watch=seen.__setitem__)
    first = nodes.sites["0.attn.attn_in"]
    handle = first.register_forward_hook(lambda module, inputs, output: expected.update(x=output))
    whole = model(contexts.idx)[0][:, -1].gather(1, contexts.answers)
    handle.remove()
    assert torch.equal(seen["0.attn.attn_in"], expected["x"])
    torch.testing.assert_close(logits, whole)
    assert not any(module._forward_hooks for module in nodes.sites.values())


def test_gates_at_zero_leave_the_means_alone():
    """With all nodes ablated the answer no longer depends on anything but the last token."""
    model = tiny_model().eval().requires_grad_(False)
    nodes = Nodes(model, means_over(model, some_tokens(5, 8)))
    one, other = some_contexts(2), some_contexts(2, seed=1)
    other.idx[:, -1] = one.idx[:, -1]
    zeros = torch.zeros(nodes.number)
    assert not torch.equal(one.idx, other.idx)
    torch.testing.assert_close(nodes.logits(one, zeros), nodes.logits(other, zeros))
    assert not torch.allclose(nodes.logits(one, 1 + zeros), nodes.logits(other, 1 + zeros), atol=1e-3)


def test_means_are_those_of_numpy():
    """Over all texts and positions, of what leaves AbsTopK."""
    model, idx = tiny_model().eval(), some_tokens(70, 8)
    seen = {}
    means = means_over(model, idx, size=32)
    for location, module in model.sites():
        module.register_forward_hook(lambda module, inputs, output, at=location: seen.setdefault(
            at, []).append(output.detach().numpy().astype(float)))
    model(idx)
    for name, mean in means.items():
        block, location = int(name.split(".")[0]), name.split(".")[-1]
        np.testing.assert_allclose(mean, seen[location][block].mean((0, 1)), atol=1e-6)
    assert len(means) == 2 * 8


def test_edges_are_counted_one_by_one():
    """Nonzero weights between two kept nodes; biases of kept nodes apart."""
    model = tiny_model().requires_grad_(False)
    model.prune_(0.4)
    nodes = Nodes(model, means_over(model, some_tokens(5, 8)))
    gates = (torch.rand(nodes.number, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    kept, edges, biases = nodes.kept(gates), 0, 0
    for read_at, written_at, weight, bias in matrices(model):
        for o in kept.get(written_at, []):
            biases += bias[o].item() != 0
            for i in kept.get(read_at, []):
                edges += weight[o, i].item() != 0
    found = count(nodes, gates)
    assert (found["nodes"], found["edges"], found["biases"]) == (int(gates.sum()), edges, biases)
    assert edges > 20 and torch.equal(nodes.gates_of(kept), gates)


def test_the_fewest_nodes_are_found_where_the_loss_is_not_monotone():
    """No smaller size close to the answer does, and none is tried twice."""
    calls = []

    def loss_at(size):
        calls.append(size)
        return 0.1 if size >= 23 or size in (19, 20) else 0.5

    size, seen = circuit.fewest(loss_at, 100, 0.15)
    assert size == 19 and len(calls) == len(set(calls)) == len(seen) < 30
    assert circuit.fewest(lambda size: 1.0, 100, 0.15)[0] is None
    assert circuit.fewest(lambda size: 0.0, 100, 0.15)[0] == 1


def found_in(model, monkeypatch, contexts=None):
    """What the search finds, on contexts to learn on and others to choose the size on."""
    for name, value in {"penalties": "3e-3", "mask_seeds": 2, "steps": 150}.items():
        monkeypatch.setattr(circuit, name, value)
    nodes = nodes_of(model)
    learning, choosing = contexts or (some_contexts(512), some_contexts(64, seed=1))
    return nodes, circuit.search(nodes, learning, choosing, 0.15, "a task")


def test_a_known_circuit_is_found_exactly(known, monkeypatch):
    """Its three nodes and two edges, by every seed: it does the task, and without it nothing is left."""
    nodes, runs = found_in(known, monkeypatch)
    judging = some_contexts(64, seed=2)
    assert [nodes.kept(found["gates"]) for found in runs] == [CIRCUIT] * 2
    gates = runs[0]["gates"]
    assert (count(nodes, gates)["nodes"], count(nodes, gates)["edges"]) == (3, 2)
    assert sceptic.result(nodes.judge(judging, gates))["accuracy"] == 1
    assert sceptic.result(nodes.judge(judging, 1 - gates))["accuracy"] == 0.5
    for name, shares in survival(nodes, judging, gates).items():
        for channel in CIRCUIT.get(name, []):
            assert shares[channel] == pytest.approx(1, abs=1e-4)
    [value] = sceptic.interventions(nodes, gates, judging)
    assert (value["site"], value["channels"]) == ("0.attn.attn_v", [5])
    assert value["removed_in_whole"]["accuracy"] == 0.5
    assert value["reversed_in_whole"]["accuracy"] == 0  # it answers the other way round


def test_masks_learned_together_are_those_learned_alone(known, monkeypatch):
    """Each trial has the contexts, the penalty and the clipped gradient that it has by itself."""
    monkeypatch.setattr(circuit, "steps", 20)
    nodes, contexts = nodes_of(known), some_contexts(512)
    trials = [(1e-3, 0), (30.0, 1), (3e-2, 0)]  # of the second the gradient is clipped
    together = circuit.learn_masks(nodes, contexts, trials)
    for trial, tau in zip(trials, together, strict=True):
        torch.testing.assert_close(circuit.learn_masks(nodes, contexts, [trial])[0], tau)
    assert not torch.allclose(together[0], together[2])


@pytest.mark.parametrize("destroy", [sceptic.drawn_anew, sceptic.shuffled_weights])
def test_a_destroyed_model_has_no_circuit(known, destroy, monkeypatch):
    """No seed reaches the target when the weights are drawn anew, or shuffled within their matrices."""
    _, runs = found_in(destroy(known, seed=3), monkeypatch)
    assert [found["nodes"] for found in runs] == [None] * 2


def test_shuffled_labels_have_no_circuit(known, monkeypatch):
    """No seed reaches the target when right and wrong are drawn by lot."""
    contexts = [sceptic.shuffled_labels(c, 5) for c in (some_contexts(512), some_contexts(64, seed=1))]
    _, runs = found_in(known, monkeypatch, contexts)
    assert [found["nodes"] for found in runs] == [None] * 2


SMALL = ("--steps=3 --mask_seeds=1 --penalties=1e-3 --batch_size=4 --choosing_contexts=32 "
         "--judging_contexts=40 --mean_windows=4 --device=cpu")


@pytest.fixture
def task(trained):
    """task(**spec) writes task.json, in a folder with a run."""
    def write(**spec):
        with open("task.json", "w", encoding="utf-8") as f:
            json.dump(spec, f)

    return write


def loss_with_hooks(record):
    """The circuit's loss, from circuit.json and the model alone."""
    model = model_of(load_checkpoint("out/ckpt.pt")).eval()
    for name, module in model.named_modules():
        site = name.removeprefix("transformer.h.")
        if site in record["means"]:
            m = torch.zeros(len(record["means"][site]))
            m[record["nodes"].get(site, [])] = 1
            ablated = (1 - m) * torch.tensor(record["means"][site])
            module.register_forward_hook(lambda module, inputs, output, m=m, a=ablated: m * output + a)
    val, length, losses = np.fromfile("data/tiny/val.bin", "<u2").astype(int), model.config.block_size, []
    for right, positions in enumerate(record["contexts"]["positions"]):
        assert all(val[p] == record["answers"][right] for p in positions)
        idx = torch.tensor(np.stack([val[p - length:p] for p in positions]))
        logits = model(idx)[0][:, -1, record["answers"]].detach()
        losses += (logits.logsumexp(1) - logits[:, right]).tolist()
    return np.mean(losses), len(losses)


def test_a_circuit_can_be_computed_again_from_its_file(task, capsys):
    """Its loss by a few hooks on the named modules; with the controls beside it, and the picture."""
    task(answers=["r", "t"], target_loss=5.0)
    assert run(f"circuit.py --task=task.json {SMALL}") == 0
    record = json.loads(read("out/circuits/task/circuit.json"))
    results, printed = record["results"], capsys.readouterr().out
    assert loss_with_hooks(record) == (pytest.approx(results["circuit"]["loss"], rel=1e-4), 40)
    assert {"whole", "circuit", "without", "nothing", "bigram_table", "last_token", "labels_shuffled",
            "weights_drawn_anew"} <= results.keys()
    assert sum(len(channels) for channels in record["nodes"].values()) == results["circuit"]["nodes"]
    assert f"{results['circuit']['loss']:.3f}" in printed and "does not prove" in printed
    with open("out/circuits/task/circuit.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"


def test_a_task_of_templates(task):
    """Prompts to learn on, held-out ones to judge by."""
    prompts = [[f"{'xy'[i % 2]}{i:02} is ", *("ab", "ba")[i % 2]] for i in range(80)]
    task(prompts=prompts[:40], held_out=prompts[40:], target_loss=5.0)
    assert run(f"circuit.py --task=task.json --controls=False {SMALL}") == 0
    record = json.loads(read("out/circuits/task/circuit.json"))
    assert sum(map(len, record["contexts"]["ids"])) == 40


@pytest.mark.parametrize("spec, flags, words", [
    ({"answers": ["r", "t"]}, "--target_loss=1e-9", ["does not do task", "train it further"]),
    ({"answers": ["ret", "t"]}, "", ["'ret'", "3 tokens"]),
    ({"answers": ["r", "Z"]}, "", ["train has 0 contexts", "'Z'"]),
    ({"answers": ["r", "t"], "contains": "nowhere"}, "", ["train has 0 contexts"]),
    ({"answers": ["r", "r"]}, "", ["is no task"]),
    ({"answers": "r"}, "", ["is no task"]),
    ({}, "", ["is no task"]),
    ({"prompts": [["a", "b", "c"]], "held_out": []}, "", ["1 prompts", "write more"]),
    ({"prompts": [["a" * 40, "b", "c"]] * 20, "held_out": []}, "", ["a prompt", "window of 16"]),
    ({"answers": ["r", "t"]}, "--ablation=median", ["mean or zero"]),
    ({"answers": ["r", "t"]}, "--penalties=some", ["penalties='some'"]),
    ({"answers": ["r", "t"]}, "--steps=0", ["steps=0"]),
    ({"answers": ["r", "t"]}, "--out_dir=nowhere", ["no checkpoint"]),
    ({"answers": ["r", "t"]}, "--task=nothing", ["no task tasks/nothing.json"]),
], ids=str)
def test_bad_input_to_circuit_is_one_line(task, capsys, spec, flags, words):
    """It says what is wrong, and nothing is written."""
    task(**spec)
    assert run(f"circuit.py --task=task.json {SMALL} {flags}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
