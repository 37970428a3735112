"""The circuit of a task: nodes, gates, means and edges against plain counts; the search on a model whose
circuit is known, because its weights were set by hand; the file that is written; and what bad input gets.

That model closes what a capital opened: after E comes X if the capital was A, and Y if it was B. The letters
a and b say the same to its value but nothing to its key, so that only attention tells which of them counts.
"""
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

from checkpoints import load_checkpoint, model_of
from circuits import controls as asked
from circuits import page, picture, report, search
from circuits.figures import new_figure, save
from circuits.nodes import Contexts, Nodes, count, hooks, means_over, node_sites, survival
from circuits.tasks import joined_otherwise, path_of, read_task
from conftest import REPO, read, run, tree
from experiments import needed
from model import GPT, GPTConfig
from test_sparsity import some_tokens, tiny_model

A, B, E, X, Y = 0, 1, 4, 5, 6  # tokens; 2 and 3 are a and b, and all others say nothing
T = 12
KNOWN = {"0.attn.attn_in": [0, 3], "0.attn.attn_k": [0], "0.attn.attn_v": [0], "0.attn.attn_out": [6]}


@pytest.fixture
def known():
    """A model that does the task above by five nodes and three weights; all else is noise beside them.

    Channel 0 of the stream says X (positive) or Y, channel 3 that it counts; key 0 reads 3, value 0 reads 0,
    and output 6 is what the unembedding tells X from Y by.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, d_model=8, d_head=2, d_mlp=8, block_size=T, vocab_size=16,
                          activation_topk_fraction=0.5)).eval().requires_grad_(False)
    attn, mlp, noise = model.transformer.h[0].attn, model.transformer.h[0].mlp, torch.randn(24, 8) * 0.1
    wte, q, k, v = model.transformer.wte.weight, 0, 8, 16  # rows of c_attn
    wte.zero_()
    wte[4:, [1, 2, 4, 5, 7]] = torch.randn(12, 5)
    wte[:4, 0] = torch.tensor([1.0, -1, 1, -1])
    wte[[A, B], 3] = 1
    attn.c_attn.weight.copy_(noise * (torch.rand(24, 8) < 0.3))
    attn.c_attn.weight[[q, k, v]] = 0
    attn.c_attn.bias[q], attn.c_attn.weight[k, 3], attn.c_attn.weight[v, 0] = 4, 1, 2
    attn.c_proj.weight.copy_(torch.randn(8, 8) * 0.1)
    attn.c_proj.weight[6], mlp.c_proj.weight[6] = 0, 0
    attn.c_proj.weight[6, 0] = 2
    model.lm_head.weight[[X, Y]] = 0
    model.lm_head.weight[[X, Y], 6] = torch.tensor([0.75, -0.75])
    model.bigram_table.zero_()
    return model


def some_contexts(n, seed=0):
    """n texts: E, ten small letters but for one capital, E; either answer is right as often."""
    rng = np.random.default_rng(seed)
    idx = rng.choice([2, 3, *range(7, 15)], size=(n, T), p=[0.25, 0.25, *[0.0625] * 8])
    capital = np.arange(n) % 2
    idx[np.arange(n), rng.integers(1, T - 1, size=n)] = capital
    idx[:, [0, -1]] = E
    answers = torch.tensor([[X, Y], [Y, X]])[capital]
    return Contexts(torch.from_numpy(idx), torch.full((n,), T - 1), answers)


def nodes_of(model, ablation="mean"):
    return Nodes(model, *means_over(model, some_contexts(200, seed=9).idx), ablation)


def gates_of(nodes, kept):
    """The gates that keep these channels: site -> list."""
    return torch.cat([torch.tensor([float(c in kept.get(name, [])) for c in range(size)])
                      for name, size in zip(nodes.sites, nodes.sizes, strict=True)])


def plain_run(model, idx, change):
    """The model's logits, with change(name, nodes) for the nodes of each site, if it returns anything."""
    names = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")
    handles = [module.register_forward_hook(lambda m, _, x, name=name: change(name.split("h.")[-1], x))
               for name, module in model.named_modules() if name.split(".")[-1] in names]
    logits = model(idx)[0]
    for handle in handles:
        handle.remove()
    return logits


def plain_count(model, kept):
    """Nonzero weights between kept nodes, and biases of kept nodes, one by one."""
    edges = biases = 0
    for i, block in enumerate(model.transformer.h):
        width = block.attn.n_head * block.attn.d_head
        attn, mlp = block.attn, block.mlp
        parts = [(attn.c_attn, number * width, "attn.attn_in", f"attn.attn_{letter}", width)
                 for number, letter in enumerate("qkv")]
        parts += [(attn.c_proj, 0, "attn.attn_v", "attn.attn_out", model.config.d_model),
                  (mlp.c_fc, 0, "mlp.mlp_in", "mlp.mlp_neuron", mlp.c_fc.weight.size(0)),
                  (mlp.c_proj, 0, "mlp.mlp_neuron", "mlp.mlp_out", model.config.d_model)]
        for linear, offset, read_at, written_at, rows in parts:
            for row in range(rows):
                if row in kept.get(f"{i}.{written_at}", []):
                    biases += linear.bias[offset + row].item() != 0
                    edges += sum(linear.weight[offset + row, column].item() != 0
                                 for column in kept.get(f"{i}.{read_at}", []))
    return edges, biases


# ----------------------------------------------------------------------------------------------------------
# nodes and gates


def test_sites_are_the_eight_of_every_block_in_forward_order():
    """Named as in named_modules, less transformer.h."""
    seen, model = [], tiny_model().eval()
    plain_run(model, some_tokens(1, 8), lambda name, x: seen.append(name))
    assert set(node_sites(model)) == set(seen) and len(seen) == 2 * 8
    assert sorted(seen, key=list(node_sites(model)).index)[::8] == ["0.attn.attn_in", "1.attn.attn_in"]


@pytest.mark.parametrize("layers", [1, 2])
def test_gates_at_one_change_nothing(layers):
    """The logits are the model's, bit for bit, wherever a text ends; and no hook stays behind."""
    model, generator = tiny_model(n_layer=layers).eval().requires_grad_(False), np.random.default_rng(0)
    contexts = Contexts(some_tokens(5, 8), torch.tensor([7, 3, 0, 7, 5]),
                        torch.from_numpy(generator.integers(11, size=(5, 2))))
    nodes = Nodes(model, *means_over(model, some_tokens(5, 8)))
    whole = model(contexts.idx)[0][torch.arange(5), contexts.last].gather(1, contexts.answers)
    assert torch.equal(nodes.logits(contexts, torch.ones(nodes.number)), whole)
    assert not torch.allclose(nodes.judge(contexts, torch.zeros(nodes.number)), whole, atol=1e-3)
    nodes.attention(contexts, torch.zeros(nodes.number), 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_a_gate_mixes_a_node_with_its_ablated_value(known, ablation):
    """Whatever number it is, as plain hooks do it."""
    nodes, contexts = nodes_of(known, ablation), some_contexts(20)
    gates = torch.rand(nodes.number, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parts = nodes.split(gates)

    def mix(name, x):
        return parts[name] * x + (1 - parts[name]) * (nodes.means[name] if ablation == "mean" else 0)

    expected = plain_run(known, contexts.idx, mix)[:, -1].gather(1, contexts.answers)
    torch.testing.assert_close(nodes.logits(contexts, gates), expected)


def test_gates_at_zero_leave_the_means_alone():
    """With all nodes ablated the answer no longer depends on anything but the last token."""
    model = tiny_model(vocab_size=16, block_size=T).eval().requires_grad_(False)
    nodes = nodes_of(model)
    one, other = some_contexts(2), some_contexts(2, seed=1)
    zeros = torch.zeros(nodes.number)
    assert not torch.equal(one.idx, other.idx)
    torch.testing.assert_close(nodes.logits(one, zeros), nodes.logits(other, zeros))
    assert not torch.allclose(nodes.logits(one, 1 + zeros), nodes.logits(other, 1 + zeros), atol=1e-3)


def test_means_are_those_of_numpy():
    """Over all texts and positions, of what leaves AbsTopK."""
    model, idx, seen = tiny_model().eval().requires_grad_(False), some_tokens(70, 8), {}
    means, _ = means_over(model, idx, size=32)
    plain_run(model, idx, lambda name, x: seen.update({name: x.numpy().astype(float)}))
    for name, mean in means.items():
        np.testing.assert_allclose(mean, seen[name].mean((0, 1)), atol=1e-6)
    assert means.keys() == seen.keys() and (seen["0.attn.attn_k"] != 0).sum(-1).max() == 4


def test_attention_is_a_softmax_with_a_sink(known):
    """Of the last token, in every head, with the nodes that the gates let through."""
    nodes, contexts, seen = nodes_of(known), some_contexts(6), {}
    known.transformer.h[0].attn.sink_logit[:] = torch.tensor([0.3, -0.2, 1.0, 0.0])
    plain_run(known, contexts.idx, seen.__setitem__)
    found = nodes.attention(contexts, torch.ones(nodes.number), 0)
    for n, head in itertools.product(range(6), range(4)):
        q, k = (seen[f"0.attn.attn_{letter}"][n, :, 2 * head:2 * head + 2] for letter in "qk")
        scores = [float(q[-1] @ k[t]) / math.sqrt(2) for t in range(T)]
        total = math.exp(known.transformer.h[0].attn.sink_logit[head]) + sum(map(math.exp, scores))
        np.testing.assert_allclose(found[n, head], [math.exp(s) / total for s in scores], rtol=1e-4)


def test_edges_are_counted_one_by_one():
    """In the empty circuit, a random one, and the whole model."""
    model = tiny_model().requires_grad_(False)
    model.prune_(0.4)
    nodes, generator = Nodes(model, *means_over(model, some_tokens(5, 8))), torch.Generator().manual_seed(0)
    for share in (0.0, 0.3, 1.0):
        gates = (torch.rand(nodes.number, generator=generator) < share).float()
        found = count(nodes, gates)
        assert (found["edges"], found["biases"]) == plain_count(model, nodes.kept(gates))
        assert found["nodes"] == gates.sum() == sum(map(len, nodes.kept(gates).values()))
    assert found["edges"] > 1000


def test_random_order_leaves_the_last_token_where_it_is():
    """And the first, and what is filled up; in a layer without positions it changes nothing."""
    contexts = some_contexts(8)
    contexts.last[::2] = 6
    contexts.last[2] = 0  # nothing is before it
    mixed = contexts.in_random_order(0)
    for row, other, last in zip(contexts.idx.tolist(), mixed.idx.tolist(), contexts.last.tolist(),
                                strict=True):
        assert row[last:] == other[last:] and row[0] == other[0] and sorted(row) == sorted(other)
        assert row != other or not last
    for layers in (1, 2):
        model = tiny_model(vocab_size=16, block_size=T, n_layer=layers).eval().requires_grad_(False)
        nodes = nodes_of(model)
        one, other = (nodes.judge(c, torch.ones(nodes.number)) for c in (contexts, mixed))
        assert torch.allclose(one, other, atol=1e-4) == (layers == 1)
        found = asked.baselines(nodes, contexts.idx.flatten().numpy(), contexts, contexts, 0)
        assert (found["whole"]["loss"], found["random_order"]["loss"]) == (
            asked.result(one)["loss"], asked.result(other)["loss"])


# ----------------------------------------------------------------------------------------------------------
# the search


def test_the_straight_through_gate_is_a_step_with_a_sigmoids_slope():
    """Exactly 0 or 1 forward."""
    tau = torch.linspace(-1, 1, 101, requires_grad=True)
    gates = search.heaviside(tau, 0.3)
    gates.sum().backward()
    assert torch.equal(gates, (tau > 0).float())
    s = 1 / (1 + np.exp(-tau.detach().numpy() / 0.3))
    np.testing.assert_allclose(tau.grad, s * (1 - s) / 0.3, rtol=1e-4)


@pytest.mark.parametrize("good, expected", [
    ({19, 20, *range(23, 101)}, 19),  # a little below is looked at
    ({3, *range(50, 101)}, 50),  # 3 is too far below to be found
    (set(range(77, 101)), 77),
    (set(range(1, 101)), 1),
    ({100}, 100),
    (set(), None),
])
def test_the_fewest_nodes_are_found_where_the_loss_is_not_monotone(good, expected):
    """What is returned reaches the target, and no size is tried twice."""
    calls = []

    def loss_at(size):
        calls.append(size)
        return 0.15 if size in good else 0.5  # the target itself reaches it

    size, seen = search.fewest(loss_at, 100, 0.15)
    assert size == expected and len(calls) == len(set(calls)) == len(seen) < 30


def found_in(model, contexts=None, fit=True):
    """What the search finds, on contexts to learn on and others to choose the size on."""
    nodes, how = nodes_of(model), search.Search((1e-2,), mask_seeds=2, steps=150, fit=fit)
    learning, choosing = contexts or (some_contexts(512), some_contexts(64, seed=1))
    return nodes, search.find(nodes, learning, choosing, 0.15, how, "a task")


def test_a_size_is_chosen_on_other_contexts_than_masks_are_learned_on(known, monkeypatch):
    """Where the answers of those to learn on are nonsense, the size is found all the same, and not the other
    way round; of the order of the nodes as much is kept as `smallest` wants."""
    nodes, learned_on = nodes_of(known), []
    nonsense, clean = asked.exchanged(some_contexts(64)), some_contexts(64, seed=1)
    monkeypatch.setattr(search, "learn_masks", lambda nodes, contexts, *_: (
        learned_on.append(contexts), gates_of(nodes, KNOWN)[None])[1])
    for learning, choosing, size in ((nonsense, clean, 5), (clean, nonsense, None)):
        [found] = search.find(nodes, learning, choosing, 0.15, search.Search(), "a task", [(1e-2, 0)])
        assert found["nodes"] == size and learned_on.pop() is learning
        assert found["lowest_loss"] == min(found["losses"].values())
        assert size or search.loss_at(nodes, choosing, found["gates"]) == found["lowest_loss"]
        assert not size or len(found["order"]) == int(max(search.MORE) * size)


@pytest.mark.parametrize("sizes, chosen", [
    ({1e-2: 20, 3e-2: 30, 3e-3: 21}, 3e-3), ({1e-2: 20, 3e-2: 21, 3e-3: 40}, 1e-2),
    ({1e-2: 20, 3e-2: 30, 3e-3: 25}, 1e-2)])
def test_the_least_penalty_that_comes_near_gets_the_other_seeds(known, monkeypatch, sizes, chosen):
    """One that ends at a tenth more nodes at most."""
    tried = []
    monkeypatch.setattr(search, "learn_masks", lambda nodes, contexts, trials, how: (
        tried.extend(trials), torch.zeros(1, nodes.number))[1])
    monkeypatch.setattr(search, "fewest", lambda *_: (
        size := sizes[tried[-1][0]], {size: 0.1, 2 * size: 0.05}))
    runs = search.find(nodes_of(known), None, None, 0.15, search.Search(mask_seeds=3), "a task")
    assert tried[len(sizes):] == [(chosen, 1), (chosen, 2)] and {p for p, _ in tried} <= sizes.keys()
    assert {run["lowest_loss"] for run in runs} == {0.05}


def test_the_target_is_met_with_the_fit_or_without(known, monkeypatch):
    """A model that prefers X does the task once a shift is fitted, and not else: each step goes by that."""
    known.bigram_table[E, X] = 30.0
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    gates, ones = gates_of(nodes, KNOWN), torch.ones(nodes.number)
    monkeypatch.setattr(search, "learn_masks", lambda *_: gates[None])
    assert search.loss_at(nodes, contexts, ones, fit=False) == pytest.approx(
        asked.result(nodes.judge(contexts, ones))["loss"])
    assert search.loss_at(nodes, contexts, ones) == pytest.approx(
        asked.fitted(nodes, ones, contexts, contexts)["loss"])
    asked.check_able("a task", nodes, np.arange(16), contexts, 0.15, True)
    with pytest.raises(SystemExit):
        asked.check_able("a task", nodes, np.arange(16), contexts, 0.15, False)
    for fit in (True, False):
        [run] = search.find(nodes, *[contexts] * 2, 0.15, search.Search(fit=fit), "a task", [(1e-2, 0)])
        assert run["nodes"] == (5 if fit else None)
        _, inside, kept, path = search.smallest(nodes, [run | {"nodes": 5}], contexts, 0.15, fit)
        assert path[0][2] == search.loss_at(nodes, contexts, gates, fit)
        costs = search.costs_of(inside, kept, contexts, path[-1][2], fit)["node_costs"]
        less = kept.clone()
        less[nodes.places["0.attn.attn_k"]] = 0
        assert costs["0.attn.attn_k.0"] == search.loss_at(inside, contexts, less, fit) - path[-1][2]


def test_a_known_circuit_is_found_exactly(known):
    """Its five nodes and three edges, by every seed: it does the task, and without it nothing is left."""
    nodes, runs = found_in(known)
    judging = some_contexts(64, seed=2)
    assert [nodes.kept(found["gates"]) for found in runs] == [KNOWN] * 2
    gates = runs[0]["gates"]
    assert torch.equal(gates, gates_of(nodes, KNOWN))
    assert (count(nodes, gates)["nodes"], count(nodes, gates)["edges"]) == (5, 3)
    assert asked.result(nodes.judge(judging, gates))["accuracy"] == 1
    assert asked.result(nodes.judge(judging, 1 - gates))["accuracy"] < 0.65
    random, _ = asked.random_draws(nodes, gates, judging, judging, 0)
    assert min(draw["loss"] for draw in random) > 0.5
    key, value = asked.interventions(nodes, gates, judging)
    assert (key["site"], value["site"], value["channels"]) == ("0.attn.attn_k", "0.attn.attn_v", [0])
    assert key["attention"] > 0.9 and key["attention_removed"] < 0.3
    assert value["reversed_in_circuit"]["accuracy"] < 0.1  # it answers the other way round
    assert asked.seeds_agree(nodes, runs)["overlaps"] == [1.0]


def test_masks_learned_together_are_those_learned_alone(known):
    """Each trial has the contexts, the penalty and the clipped gradient that it has by itself."""
    nodes, contexts, how = nodes_of(known), some_contexts(512), search.Search(steps=20)
    trials = [(1e-3, 0), (30.0, 1), (3e-2, 0)]  # of the second the gradient is clipped
    together = search.learn_masks(nodes, contexts, trials, how)
    for trial, tau in zip(trials, together, strict=True):
        torch.testing.assert_close(search.learn_masks(nodes, contexts, [trial], how)[0], tau)
    assert not torch.allclose(together[0], together[2])
    far = search.learn_masks(nodes, contexts, trials, search.Search(steps=4, learning_rate=2.0))
    assert far.abs().max() == 1


@pytest.mark.parametrize("destroy", [asked.drawn_anew, asked.shuffled_weights])
def test_a_destroyed_model_has_no_circuit(known, destroy):
    """No seed reaches the target when the weights are drawn anew, or shuffled within their matrices."""
    before = {name: p.clone() for name, p in known.named_parameters()}
    other = destroy(known, seed=3)
    assert all(torch.equal(p, before[name]) for name, p in known.named_parameters())
    if destroy is asked.shuffled_weights:
        for name, p, _ in other.sparse_parameters():
            assert torch.equal(p.flatten().sort().values, before[name].flatten().sort().values)
    _, runs = found_in(other)
    assert [found["nodes"] for found in runs] == [None] * 2


def test_weights_drawn_anew_are_as_many():
    """And others."""
    model = tiny_model().requires_grad_(False)
    model.prune_(0.4)
    other = asked.drawn_anew(model, seed=3)
    (before, number), (after, _) = ((sum(int(f(p)) for p in m.decayed_parameters()) for f in (
        torch.count_nonzero, torch.numel)) for m in (model, other))
    assert before < number / 2 and after == pytest.approx(before, rel=0.02)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_shuffled_labels_have_no_circuit(known):
    """No seed reaches the target when right and wrong are drawn by lot."""
    contexts = [asked.shuffled_labels(c, 5) for c in (some_contexts(512), some_contexts(64, seed=1))]
    _, runs = found_in(known, contexts)
    assert [found["nodes"] for found in runs] == [None] * 2


@pytest.mark.parametrize("sinks", [True, False])
def test_removing_an_edge_is_what_editing_the_weight_does(sinks):
    """The weight to zero, and it times the mean of what it reads to the bias, in every Linear of a block;
    parts with other gates do not mix. Of nodes at their means no edge but a value's can be missed."""
    model = tiny_model(n_layer=2, use_attention_sinks=sinks).eval().requires_grad_(False)
    idx, generator = some_tokens(6, 8), torch.Generator().manual_seed(0)
    contexts = Contexts(idx, torch.full((6,), 7), torch.tensor([[3, 5]] * 6))
    nodes = Nodes(model, *means_over(model, some_tokens(5, 8)))
    ones = torch.ones(nodes.number)
    every = [edge[:4] for edge in nodes.edges_in(ones)]
    chosen = [every[i] for i in torch.randperm(len(every), generator=generator)[:60]]
    nodes = nodes.with_edges(chosen)
    assert {(a.split(".", 1)[1], b.split(".", 1)[1]) for a, _, b, _ in chosen} == {
        ("attn.attn_in", "attn.attn_q"), ("attn.attn_in", "attn.attn_k"), ("attn.attn_in", "attn.attn_v"),
        ("attn.attn_v", "attn.attn_out"), ("mlp.mlp_in", "mlp.mlp_neuron"),
        ("mlp.mlp_neuron", "mlp.mlp_out")}
    off = torch.ones(nodes.number)
    off[nodes.nodes:] = 0
    whole, removed = nodes.logits(contexts, torch.ones(nodes.number)), nodes.logits(contexts, off)
    both = nodes.logits(contexts, torch.stack([torch.ones(nodes.number), off]))
    torch.testing.assert_close(both, torch.cat([whole[:3], removed[3:]]))
    assert not torch.allclose(whole, removed, atol=1e-4)
    lone = torch.zeros(nodes.number)
    for e, (a, _, b, _) in enumerate(chosen):
        lone[nodes.nodes + e] = a.endswith("attn_v")
    torch.testing.assert_close(nodes.logits(contexts, lone), nodes.with_edges(()).logits(
        contexts, torch.zeros(nodes.nodes)))
    lone[[nodes.places[b] + o for _, _, b, o in chosen]] = 1  # what is written is kept, what is read is not
    cut = lone.clone()
    cut[nodes.nodes:] = 0
    of_values = [e for e, edge in enumerate(chosen) if edge[0].endswith("attn_v")]
    assert nodes.cut(lone) == [] and nodes.cut(cut) == [
        chosen[e] for e in of_values if chosen[e][:2] not in {edge[2:] for edge in chosen}]
    assert not torch.allclose(nodes.logits(contexts, lone), nodes.logits(contexts, cut), atol=1e-5)

    means, reads = plain_means(model, some_tokens(5, 8))
    for a, i, b, o in chosen:
        block = model.transformer.h[int(a[0])]
        width = block.attn.n_head * block.attn.d_head
        linear = {"attn_in": block.attn.c_attn, "attn_v": block.attn.c_proj, "mlp_in": block.mlp.c_fc,
                  "mlp_neuron": block.mlp.c_proj}[a.split(".")[-1]]
        row = o + {"attn_k": width, "attn_v": 2 * width}.get(b.split(".")[-1], 0)
        mean = reads[a][i] if a.endswith("attn_v") else means[a][i]
        linear.bias[row] += linear.weight[row, i] * mean
        linear.weight[row, i] = 0
    torch.testing.assert_close(model(idx)[0][:, -1, [3, 5]], removed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_what_attention_has_read_need_not_be_read_again(layers, monkeypatch):
    """Gates that act later do not change it, whichever they are, and others do."""
    model = tiny_model(n_layer=layers, use_positional_embeddings=True).eval().requires_grad_(False)
    contexts = Contexts(some_tokens(6, 8), torch.tensor([7, 3, 1, 7, 5, 6]), torch.tensor([[3, 5]] * 6))
    nodes = Nodes(model, *means_over(model, some_tokens(5, 8)))
    nodes = nodes.with_edges([edge[:4] for edge in nodes.edges_in(torch.ones(nodes.number))[::7]])
    monkeypatch.setattr(Contexts, "batches", lambda self: (self[rows] for rows in torch.arange(6).split(4)))
    generator, ones = torch.Generator().manual_seed(0), torch.ones(nodes.number)
    early, known = nodes.is_early(), nodes.until_read(contexts, ones)
    gates = torch.where(early, 1.0, (torch.rand(nodes.number, generator=generator) < 0.5).float())
    assert torch.equal(nodes.judge(contexts, gates, known), nodes.judge(contexts, gates))
    assert not torch.allclose(nodes.judge(contexts, ones, known), nodes.judge(contexts, gates), atol=1e-5)

    def changes(gate):
        less = ones.clone()
        less[gate] = 0
        return any(not torch.equal(a, b) for one, other in zip(known, nodes.until_read(contexts, less))
                   for a, b in zip(one, other))

    assert not any(changes(gate) for gate in (~early).nonzero()[:, 0].tolist())
    assert any(changes(nodes.places[f"{layers - 1}.attn.attn_v"] + i) for i in range(8))
    of_edges = [edge[2].split(".", 1)[1] for edge, is_early in zip(
        nodes.edges, early[nodes.nodes:].tolist()) if is_early and edge[2].startswith(str(layers - 1))]
    assert set(of_edges) == {"attn.attn_q", "attn.attn_k", "attn.attn_v"}


def plain_means(model, idx):
    """Of all nodes, and of what the projection of attention reads."""
    means, reads = {}, {}
    handles = [block.attn.c_proj.register_forward_pre_hook(
        lambda m, x, i=i: reads.update({f"{i}.attn.attn_v": x[0].mean((0, 1))}))
        for i, block in enumerate(model.transformer.h)]
    plain_run(model, idx, lambda name, x: means.update({name: x.mean((0, 1))}))
    for handle in handles:
        handle.remove()
    return means, reads


def test_what_is_not_needed_is_removed(known):
    """Of the known circuit and thirty nodes more, with their weights, the known one is left."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    gates = gates_of(nodes, KNOWN)
    gates[torch.randperm(nodes.number, generator=torch.Generator().manual_seed(1))[:30]] = 1
    before = count(nodes, gates)
    inside, needed, path = search.needed(nodes, gates, contexts, 0.15, fit=False)
    assert before["nodes"] > 25 and before["weights"] > 20
    assert inside.kept(needed) == KNOWN and len(inside.edges_in(needed)) == 3
    assert path[0][:2] == [before["nodes"], before["edges"]] and path[-1][:2] == [5, 3]
    assert all(loss <= 0.15 for *_, loss in path[1:])
    assert search.loss_at(inside, contexts, needed, fit=False) == path[-1][2]
    assert count(inside, needed)["edges"] == 3
    assert needed[inside.nodes:][~inside.joined(needed)].eq(1).all()


def test_a_value_without_edges_goes_and_they_stay_removed():
    """Though with them, at its mean, the circuit would miss the target; a value with an edge stays."""
    model = tiny_model().eval().requires_grad_(False)
    contexts = Contexts(some_tokens(40, 8), torch.full((40,), 7), torch.tensor([[3, 5], [5, 3]] * 20))
    nodes = Nodes(model, *means_over(model, some_tokens(30, 8)))
    nodes = nodes.with_edges([edge[:4] for edge in nodes.edges_in(torch.ones(nodes.nodes))])
    gates = torch.ones(nodes.number)
    value = nodes.places["0.attn.attn_v"]
    mine = [e for e, edge in enumerate(nodes.edges) if edge[:2] == ("0.attn.attn_v", 0)]
    gates[[nodes.nodes + e for e in mine]] = 0
    target = search.loss_at(nodes, contexts, gates, False) + 1e-6
    circuit = search.Removal(nodes, gates, contexts, target, False)
    back = circuit.without([value])
    assert back[nodes.nodes:].all() and abs(search.loss_at(nodes, contexts, back, False) - target) > 1e-5
    circuit.drop_idle()
    assert circuit.gates[value] == 0 and nodes.cut(circuit.gates) == [nodes.edges[e] for e in mine]
    assert circuit.gates[:nodes.nodes].sum() == nodes.nodes - 1
    assert circuit.path[-1][2] == search.loss_at(nodes, contexts, circuit.gates, False) <= target
    read = nodes.places["0.attn.attn_in"]
    assert nodes.cut(circuit.without([read])) == nodes.cut(circuit.gates)  # whatever goes later


def test_what_is_not_needed_is_found_behind_what_is(known, monkeypatch):
    """However wrong the estimates are: then all candidates are measured, and the cheapest of them once more,
    on all contexts."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    gates = gates_of(nodes, KNOWN)
    gates[torch.randperm(nodes.number, generator=torch.Generator().manual_seed(1))[:30]] = 1
    right = search.estimated_costs
    monkeypatch.setattr(search, "estimated_costs", lambda *args: -right(*args))
    monkeypatch.setattr(search, "MEASURED", 2)
    monkeypatch.setattr(search, "QUICKLY", 16)
    inside, needed, _ = search.needed(nodes, gates, contexts, 0.15, fit=False)
    assert inside.kept(needed) == KNOWN and len(inside.edges_in(needed)) == 3


def test_a_circuit_loses_edges_though_its_nodes_stay(known):
    """An idle weight between two nodes that are needed is removed, and both numbers are counted."""
    known.transformer.h[0].attn.c_attn.weight[16, 3] = 1e-3  # value 0 reads channel 3 too, hardly
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    inside, gates, _ = search.needed(nodes, gates_of(nodes, KNOWN), contexts, 0.15, fit=False)
    assert (count(inside, gates)["weights"], count(inside, gates)["edges"]) == (4, 3)
    assert ("0.attn.attn_in", 3, "0.attn.attn_v", 0) not in [edge[:4] for edge in inside.edges_in(gates)]


@pytest.mark.parametrize("kept", [0, 1])
def test_only_between_kept_nodes_an_edge_can_be_missing(known, kept):
    """Of two nodes that are gone the edge is neither counted as removed nor missing in the model without the
    circuit, whether its gate is 0 or 1."""
    nodes = nodes_of(known)
    gates = gates_of(nodes, KNOWN)
    inside = nodes.with_edges([edge[:4] for edge in nodes.edges_in(gates)])
    less = torch.cat([gates, torch.ones(3)])
    less[[nodes.places["0.attn.attn_in"] + 3, nodes.places["0.attn.attn_k"]]] = 0
    less[nodes.number + inside.edges.index(("0.attn.attn_in", 3, "0.attn.attn_k", 0))] = kept
    assert count(inside, less)["edges"] == count(inside, less)["weights"] == len(inside.edges_in(less)) == 2
    rest, plain = inside.others(less), 1 - less[:nodes.number]
    assert count(inside, rest) == count(nodes, plain) and plain.sum() == nodes.number - 3
    assert torch.equal(inside.judge(some_contexts(8), rest), nodes.judge(some_contexts(8), plain))


@pytest.mark.parametrize("scale, shift", [(0.5, 1.0), (3.0, -2.0), (1.0, 0.0)])
def test_the_fit_is_the_best_of_a_grid(scale, shift):
    """Of noisy logits no scale and shift near by does better; a circuit that is always wrong gets none."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.tensor([1.0, -1.0]).repeat(200)
    margin = (2 * sides + 2 * torch.randn(400, generator=generator) - shift) / scale * sides
    logits = torch.stack([margin, torch.zeros(400)], dim=1)
    wrong = 1 / 202

    def loss(s, t):
        fitted = search.apply_fit(logits, sides, s, t)
        return ((1 - wrong) * search.loss_of(fitted) + wrong * search.loss_of(fitted.flip(1))).mean().item()

    s, t = search.fit_of(logits, sides)
    assert all(loss(s, t) <= loss(s + ds, t + dt) + 1e-9
               for ds in (-0.02, 0, 0.02) for dt in (-0.05, 0, 0.05))
    assert search.fit_of(-100 * logits.abs() @ torch.tensor([[1.0, 0], [0, 0]]), sides) == (0.0, 0.0)


@pytest.mark.parametrize("sizes, tried, best", [
    ({1e-2: 20, 3e-2: 30, 3e-3: 25}, 3, 1e-2),
    ({1e-2: 20, 3e-2: 15, 1e-1: 12, 3e-1: 50}, 4, 1e-1),
    ({1e-2: 20, 3e-2: 30, 3e-3: 10, 1e-3: 40}, 4, 3e-3),
    ({1e-2: math.inf, 3e-3: math.inf, 1e-3: 70, 3e-4: 90}, 4, 1e-3),  # 3e-3 failed already
    (dict.fromkeys((1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5), math.inf), 7, 1e-2),
])
def test_the_best_penalty_is_bracketed(sizes, tried, best):
    """Its neighbours were tried, none twice, and while nothing is found only lower ones."""
    calls = []
    found = search.bracketed(lambda p: (calls.append(p), sizes[p])[1], search.LADDER, 1e-2)
    assert found == {p: sizes[p] for p in calls} and len(calls) == len(set(calls)) == tried
    assert min(found, key=found.get) == best


def test_penalties_are_found_and_then_the_other_seeds_tried(known):
    """Where nothing is said of them; the circuit is the known one, and trials can be given instead."""
    nodes, how = nodes_of(known), search.Search(mask_seeds=2, steps=60)
    sets = some_contexts(512), some_contexts(64, seed=1)
    runs = search.find(nodes, *sets, 0.15, how, "a task")
    penalties = [run["penalty"] for run in runs if run["mask_seed"] == 0]
    assert len(penalties) == len(set(penalties)) >= 3 and [run["mask_seed"] for run in runs][-1] == 1
    assert runs[-1]["penalty"] in penalties and len(runs) == len(penalties) + 1
    assert runs[0]["order"][:5] == [int(i) for i in torch.tensor(runs[0]["order"][:5])]
    again = search.find(nodes, *sets, 0.15, how, "a task", [(runs[0]["penalty"], 0)])
    assert len(again) == 1 and torch.equal(again[0]["gates"], runs[0]["gates"])


def test_a_constant_node_becomes_a_bias(known):
    """A query that nothing kept speaks to is no node: its value stays, and the loss with it."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    with_query = {"0.attn.attn_q": [0]} | KNOWN
    nodes = nodes.with_value("0.attn.attn_q", 0, 0.0)  # without its bias the head looks nowhere
    gates = gates_of(nodes, with_query)
    before = search.loss_at(nodes, contexts, gates, fit=False)
    assert search.loss_at(nodes, contexts, gates_of(nodes, KNOWN), fit=False) > before + 0.1
    inside, needed, path = search.needed(nodes, gates, contexts, 0.15, fit=False)
    assert inside.kept(needed) == KNOWN
    assert inside.ablated["0.attn.attn_q"][0].item() == pytest.approx(4, rel=1e-4)
    assert path[-1][2] == pytest.approx(before, abs=1e-4)
    assert nodes.ablated["0.attn.attn_q"][0] == 0
    size = count(inside, needed)
    assert path[-1][:2] == [size["nodes"], size["edges"]] == [5, 3]


def test_a_node_that_hardly_varies_becomes_a_bias(known):
    """By how large it is, a hundredth of which is little. A removed edge to it is none any more."""
    known.transformer.h[0].attn.c_attn.weight[0, 0] = 0.015
    nodes, contexts = nodes_of(known).with_value("0.attn.attn_q", 0, 0.0), some_contexts(64, seed=1)
    gates = gates_of(nodes, {"0.attn.attn_q": [0]} | KNOWN)
    query = nodes.activations(contexts, gates)["0.attn.attn_q"][:, 0]
    assert 2 * search.CONSTANT < query.var() < 8 * search.CONSTANT and query.mean() > 3.9
    for removed in (False, True):
        circuit = search.Removal(nodes, gates, contexts, 0.15, fit=False)
        to_query = [edge[2:] == ("0.attn.attn_q", 0) for edge in circuit.nodes.edges]
        circuit.gates[nodes.nodes:][torch.tensor(to_query)] = float(not removed)
        inside, left = search.fold(circuit)
        assert inside.kept(left) == KNOWN and any(to_query) and left[nodes.nodes:].all()


def test_a_node_that_varies_becomes_no_bias(known, monkeypatch):
    """Though at the last token it is always the same; nor one without which the target is missed."""
    known.transformer.h[0].attn.c_attn.weight[0, 0] = 1  # to query 0, of the letters, which ask nothing
    nodes, contexts = nodes_of(known).with_value("0.attn.attn_q", 0, 0.0), some_contexts(64, seed=1)
    with_query = {"0.attn.attn_q": [0]} | KNOWN
    for share in (search.CONSTANT, 10.0):
        monkeypatch.setattr(search, "CONSTANT", share)  # with 10 all of them count as constant
        circuit = search.Removal(nodes, gates_of(nodes, with_query), contexts, 0.15, fit=False)
        inside, gates = search.fold(circuit)
        assert inside.kept(gates) == (with_query if share < 1 else KNOWN) and circuit.path[-1][2] <= 0.15


def test_of_the_circuits_found_the_one_with_fewest_edges_is_taken(known, capsys):
    """Those that are much larger are not even tried, and equal ones once; without any the script ends."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    idle = gates_of(nodes, KNOWN | {"0.mlp.mlp_in": [1]})
    order = torch.cat([idle.nonzero()[:, 0], (idle == 0).nonzero()[:, 0]]).tolist()
    runs = [{"nodes": n, "gates": gates, "lowest_loss": loss, "order": order} for n, gates, loss in (
        (6, idle, 0.1), (6, idle, 0.1), (None, 0 * idle, 0.5), (16, torch.ones(nodes.number), 0.1))]
    run, inside, gates, path = search.smallest(nodes, runs, contexts, 0.15)
    assert run is runs[0] and inside.kept(gates) == KNOWN and path[-1][:2] == [5, 3]
    printed = capsys.readouterr().out
    assert printed.count("needed |") == len(search.MORE)
    assert all(f"{more:g} x the fewest: {int(6 * more)} nodes" in printed for more in search.MORE)
    with pytest.raises(SystemExit):
        search.smallest(nodes, runs[2:3], contexts, 0.15)
    assert "the best was 0.500" in capsys.readouterr().err


def test_fewer_edges_count_before_fewer_nodes(known, monkeypatch):
    """Of what is left of the circuits, not of what they were; and none counts that misses the target."""
    paths = iter([([9, 1, 0.1], [5, 10, 0.1]), ([9, 9, 0.1], [7, 3, 0.1]), ([9, 9, 0.1], [6, 3, 0.1]),
                  ([9, 9, 0.2], [5, 2, 0.16])])
    monkeypatch.setattr(search, "needed", lambda nodes, gates, *_: (nodes, gates, next(paths)))
    nodes = nodes_of(known)
    runs = [{"nodes": 9, "gates": torch.full((nodes.number,), i / 2), "order": list(range(nodes.number))}
            for i in (1, 2)]
    *_, path = search.smallest(nodes, runs, some_contexts(4), 0.15)
    assert path[-1] == [6, 3, 0.1] and next(paths, None) is None


@pytest.mark.parametrize("fit", [True, False])
def test_a_recorded_row_is_what_its_circuit_says(known, fit):
    """Of experiments/needed.py: the smallest of the masks that reach the target, less what is idle; losses
    and accuracy on the contexts that judge, with the fit of those that choose."""
    nodes, sets = nodes_of(known), [None, some_contexts(64, seed=1), some_contexts(50, seed=2)]
    gates = gates_of(nodes, KNOWN)
    gates[torch.randperm(nodes.number, generator=torch.Generator().manual_seed(1))[:30]] = 1
    order, size = gates.argsort(descending=True, stable=True), int(gates.sum())
    masks = [SimpleNamespace(order=order, penalty=0.1, mask_seed=0, fewest=lambda t, fit: None),
             SimpleNamespace(order=order, penalty=0.2, mask_seed=1, fewest=lambda t, fit: size + 1),
             SimpleNamespace(order=order, penalty=0.3, mask_seed=2, fewest=lambda t, fit: size)]
    row, (inside, left, parameters, mask) = needed.search_one(nodes, masks, sets, 0.15, fit, 0)
    assert mask is masks[2] and (row["penalty"], row["mask_seed"], row["nodes"]) == (0.3, 2, size)
    assert row["weights"] == count(nodes, gates)["weights"] > row["needed_edges"] == 3
    again, _ = needed.search_one(nodes, masks, sets, 0.15, fit, 0, (inside, left, parameters, mask))
    assert again | {"cpu_seconds": ""} == row | {"cpu_seconds": ""}
    assert row["needed_nodes"] == 5 and inside.kept(left) == KNOWN
    best = search.fit_of(inside.judge(sets[1], left), sets[1].sides())
    assert parameters == (best if fit else (1.0, 0.0))
    logits = inside.judge(sets[2], left)
    fitted = search.apply_fit(logits, sets[2].sides(), *best)
    assert float(row["train_loss"]) == pytest.approx(search.loss_at(inside, sets[1], left, fit), abs=1e-4)
    for column, of in (("val_loss", logits), ("val_loss_fitted", fitted)):
        assert float(row[column]) == pytest.approx(search.loss_of(of).mean().item(), abs=1e-4)
    right = ((fitted if fit else logits).diff(dim=1) < 0).float().mean().item()
    assert float(row["accuracy"]) == pytest.approx(right, abs=1e-4)
    assert float(row["chance_train_loss"]) > 2 * float(row["train_loss"])
    assert needed.search_one(nodes, masks[:1], sets, 0.15, fit, 0) == (
        {"target_loss": 0.15, "fit": int(fit)}, None)


def test_what_is_removed_from_may_miss_the_target(known, monkeypatch):
    """Twice the fewest nodes may do worse than they: then the fewest are what is removed from."""
    nodes, sets, right = nodes_of(known), [None, some_contexts(64, seed=1), some_contexts(50)], needed.needed
    order = gates_of(nodes, KNOWN).argsort(descending=True, stable=True)
    mask = SimpleNamespace(order=order, penalty=0.1, mask_seed=0, fewest=lambda t, fit: 5)
    monkeypatch.setattr(needed, "needed", lambda nodes, gates, *rest: right(nodes, gates, *rest) if
                        gates.sum() == 5 else (nodes, gates, [[1, 0, 0.2]]))
    row, _ = needed.search_one(nodes, [mask], sets, 0.15, False, 0)
    assert (row["needed_nodes"], row["needed_edges"]) == (5, 3) and float(row["train_loss"]) <= 0.15


def test_costs_are_what_removal_costs(known):
    """Of each edge and each node of the circuit, one by one."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    inside, gates, path = search.needed(nodes, gates_of(nodes, KNOWN), contexts, 0.15)
    found = search.costs_of(inside, gates, contexts, path[-1][2])
    assert len(found["edge_costs"]) == 3 and min(found["edge_costs"]) > 0.05
    assert set(found["node_costs"]) == {f"{site}.{c}" for site, of in KNOWN.items() for c in of}
    off = gates_of(nodes, KNOWN)
    off[nodes.places["0.attn.attn_k"]] = 0
    assert found["node_costs"]["0.attn.attn_k.0"] == pytest.approx(
        search.loss_at(nodes, contexts, off) - path[-1][2], abs=1e-5)


@pytest.mark.parametrize("fit", [True, False])
def test_estimated_costs_are_the_slope_of_the_loss(known, fit):
    """As each gate goes down from 1 a little, with the scale and the shift that the whole has."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    gates, sides = gates_of(nodes, KNOWN), contexts.sides()
    numbers = search.fit_of(nodes.judge(contexts, gates), sides) if fit else (1.0, 0.0)
    found = search.estimated_costs(nodes, contexts, gates, fit)

    def loss(gates):
        return search.loss_of(search.apply_fit(nodes.judge(contexts, gates), sides, *numbers)).mean().item()

    for place in gates.nonzero()[:, 0]:
        step = torch.zeros_like(gates)
        step[place] = 0.01
        slope = (loss(gates - step) - loss(gates + step)) / 0.02
        assert found[place].item() == pytest.approx(slope, rel=0.02)
    assert found.abs().max() > 1e-2


def test_what_would_miss_the_target_stays(known):
    """By however little: a target just below what the cheapest removal costs leaves the circuit whole, one
    just above does not."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    circuit = search.Removal(nodes, gates_of(nodes, KNOWN), contexts, 0.15, True)
    losses = circuit.by_measure(circuit.candidates(), contexts)
    least = min(losses.values())
    assert list(losses.values()) == sorted(losses.values()) and len(losses) == 5 + 3
    assert losses == {c: search.loss_at(circuit.nodes, contexts, circuit.without([c])) for c in losses}
    for target, whole in ((least - 1e-3, True), (least, False)):
        *_, path = search.needed(nodes, gates_of(nodes, KNOWN), contexts, target)
        assert (path[-1][:2] == [5, 3]) == whole and all(loss <= target for *_, loss in path)
    circuit.target = least - 1e-3
    assert not circuit.take(list(losses), [2, 1])
    circuit.target = least
    assert circuit.take(list(losses), [2, 1]) and circuit.path[-1][2] == least
    circuit = search.Removal(nodes, gates_of(nodes, KNOWN), contexts, 0.15, True)
    circuit.gates[nodes.places["0.attn.attn_k"]] = 0
    assert len(circuit.candidates()) == 4 + 2  # of a node that is gone the edge is none


def test_some_contexts_say_by_how_much_the_loss_rises(known, monkeypatch):
    """Though it is far higher on these than on all, as where they alone miss the target."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    gates = gates_of(nodes, KNOWN)
    contexts.answers[:4] = contexts.answers[:4].flip(1)
    monkeypatch.setattr(search, "QUICKLY", 16)
    circuit = search.Removal(nodes, gates, contexts, 0.15, fit=False)
    some, query = circuit.some, nodes.places["0.attn.attn_q"]

    def loss(of, gates):
        return search.loss_at(circuit.nodes, of, gates, fit=False)

    assert loss(some, circuit.gates) > 2 * loss(contexts, circuit.gates)
    less = circuit.without([query])
    rise = loss(some, less) - loss(some, circuit.gates)
    assert circuit.by_measure([query], some)[query] == pytest.approx(loss(contexts, circuit.gates) + rise)


def test_the_loss_rises_by_quarters(known, monkeypatch):
    """What costs little goes before the whole of what is allowed may be used up."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    gates, targets, take = gates_of(nodes, KNOWN), [], search.Removal.take
    gates[torch.randperm(nodes.number, generator=torch.Generator().manual_seed(1))[:30]] = 1

    def noted(circuit, *args):
        targets.append(circuit.target)
        went = take(circuit, *args)
        assert circuit.path[-1][2] <= circuit.target
        return went

    monkeypatch.setattr(search.Removal, "take", noted)
    *_, path = search.needed(nodes, gates, contexts, 0.15, fit=False)
    begun = path[0][2]
    assert list(dict.fromkeys(targets)) == pytest.approx(
        [begun + share * (0.15 - begun) for share in (0.25, 0.5, 0.75, 1)])
    assert targets[-1] == 0.15 and path[-1][:2] == [5, 3]


def test_what_begins_above_the_target_comes_down_to_it(known):
    """More nodes than the fewest may miss the target: then what goes must not raise the loss further."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    *_, path = search.needed(nodes, gates_of(nodes, KNOWN), contexts, 0.0, fit=False)
    assert [size for *size, _ in path] == [[5, 3]]
    gates = gates_of(nodes, KNOWN)
    nodes.split(gates)["0.attn.attn_k"][:] = -1  # it looks away
    *_, path = search.needed(nodes, gates, contexts, 0.15, fit=False)
    losses = [loss for *_, loss in path]
    assert losses[0] > losses[1] > 0.15 and losses == sorted(losses, reverse=True)


def test_the_last_node_stays(known):
    """A target that nothing misses takes all nodes but one, though it may be constant and its edges gone."""
    nodes, contexts = nodes_of(known), some_contexts(64, seed=1)
    for kept in (KNOWN, {"0.attn.attn_q": [0]}, KNOWN | {"0.attn.attn_q": [0]}):
        inside, gates, path = search.needed(nodes, gates_of(nodes, kept), contexts, 5.0, fit=False)
        assert sum(map(len, inside.kept(gates).values())) == path[-1][0] == 1


# ----------------------------------------------------------------------------------------------------------
# what is measured of a circuit


def test_the_last_token_alone_is_counted_with_both_answers_as_frequent():
    """0 is followed by 5 twice and by 6 once, but 6 is twice as frequent in all."""
    train = np.array([0, 5, 0, 5, 1, 6, 1, 6, 1, 6, 0, 6])
    contexts = Contexts(torch.tensor([[0], [1]]), torch.tensor([0, 0]), torch.tensor([[5, 6], [5, 6]]))
    shares = asked.shares_before(train, contexts.answers.unique().tolist())
    share = asked.last_token_alone(shares, contexts).softmax(-1)
    np.testing.assert_allclose(share[0], [1 / 1.25, 0.25 / 1.25], atol=1e-4)
    assert share[1, 0] < 1e-4


def test_a_fit_undoes_a_shift(known):
    """A model that always prefers X is right once the shift is fitted; one that is right stays modest."""
    nodes, contexts = nodes_of(known), some_contexts(200)
    sure = asked.fitted(nodes, torch.ones(nodes.number), contexts[:20], contexts)
    assert sure["accuracy"] == 1 and 0.03 < sure["loss"] < 0.15
    known.bigram_table[E, X] = 30.0
    ones = torch.ones(nodes.number)
    assert asked.result(nodes.judge(contexts, ones))["accuracy"] < 0.6
    assert asked.fitted(nodes, ones, contexts, contexts)["accuracy"] > 0.95


def test_random_draws_have_as_many_nodes_at_every_site(known):
    """All of them among those that are ever active."""
    nodes = nodes_of(known)
    drawn = asked.random_like(nodes, gates_of(nodes, KNOWN), torch.Generator().manual_seed(0))
    assert {n: len(c) for n, c in nodes.kept(drawn).items()} == {n: len(c) for n, c in KNOWN.items()}
    assert all(nodes.means[name][c] != 0 for name, channels in nodes.kept(drawn).items() for c in channels)
    nodes.means["0.attn.attn_v"][torch.arange(8) != 5] = 0
    for seed in range(3):
        drawn = asked.random_like(nodes, gates_of(nodes, KNOWN), torch.Generator().manual_seed(seed))
        assert nodes.kept(drawn)["0.attn.attn_v"] == [5]


def test_a_faithful_circuit_agrees_with_the_whole_model(known):
    """In what it answers, right or wrong, and what its one head attends to; an empty circuit does not."""
    nodes, contexts = nodes_of(known), asked.shuffled_labels(some_contexts(100), 0)
    gates = gates_of(nodes, KNOWN)
    same = asked.faithfulness(nodes, gates, contexts, 0)
    assert same["same_answer"] == 1 and same["correlation"] > 0.9
    head = same["attention"]["0.0"]
    assert list(same["attention"]) == ["0.0"]
    assert head["whole"] > 0.9 and head["circuit"] > 0.9 and head["same"] > 0.9
    nothing, clean = asked.agreement(nodes, 0 * gates, contexts), some_contexts(100)
    assert nothing["same_answer"] == 0.5 and abs(nothing["correlation"]) < 0.01
    found = asked.agreement(nodes, gates, clean)
    assert (found["right"], found["whole_right"]) == (1, 1)
    assert asked.agreement(nodes, 0 * gates, clean)["right"] == 0.5
    some = (torch.rand(nodes.number, generator=torch.Generator().manual_seed(2)) < 0.7).float()
    prefer_x = [np.array([right - other if answers[0] == X else other - right for (right, other), answers in
                          zip(nodes.judge(contexts, g).tolist(), contexts.answers.tolist(), strict=True)])
                for g in (torch.ones(nodes.number), some)]
    is_x = contexts.answers[:, 0].numpy() == X
    assert asked.agreement(nodes, some, contexts) == pytest.approx(
        {"right": np.mean((prefer_x[1] > 0) == is_x), "whole_right": np.mean((prefer_x[0] > 0) == is_x),
         "same_answer": np.mean((prefer_x[0] > 0) == (prefer_x[1] > 0)),
         "correlation": np.corrcoef(prefer_x)[0, 1]}, abs=1e-4)
    always_x = asked.agreement(nodes, gates, contexts, (1.0, 100.0))
    assert always_x["right"] == pytest.approx(is_x.mean())
    assert always_x["same_answer"] == pytest.approx(np.mean(prefer_x[0] > 0)) != same["same_answer"]
    gates[nodes.split(torch.arange(nodes.number))["0.attn.attn_k"][0]] = 0
    head = asked.attention_kept(nodes, gates, contexts)["0.0"]
    assert head["whole"] > 0.9 and head["circuit"] < 0.3 and head["same"] < 0.4


def test_a_share_of_the_other_nodes_is_given_back(known, monkeypatch):
    """To the circuit, drawn anew each time."""
    nodes, contexts, seen = nodes_of(known), some_contexts(4), []
    judge, gates = nodes.judge, gates_of(nodes, KNOWN)
    monkeypatch.setattr(nodes, "judge", lambda contexts, g: (seen.append(g), judge(contexts, g))[1])
    given_back = asked.faithfulness(nodes, gates, contexts, 0)["given_back"]
    tried = torch.stack(seen[:asked.DRAWS * len(asked.GIVEN_BACK)])
    assert list(given_back) == [str(share) for share in asked.GIVEN_BACK] and (tried >= gates).all()
    assert tried.sum(1).tolist() == asked.DRAWS * [
        5 + int(share * (nodes.number - 5)) for share in asked.GIVEN_BACK]
    assert len(tried.unique(dim=0)) == len(tried)


def test_nodes_of_a_head_are_removed_one_by_one_and_together(known):
    """Neurons one by one."""
    nodes = nodes_of(known)
    gates = gates_of(nodes, {"0.attn.attn_k": [0, 1, 5], "0.attn.attn_v": [4], "0.mlp.mlp_neuron": [0, 1]})
    assert nodes.kept_heads(gates) == [(0, 0), (0, 2)]
    found = [(r["site"][-1], r["channels"]) for r in asked.interventions(nodes, gates, some_contexts(4))]
    assert found == [("k", [0]), ("k", [1]), ("k", [5]), ("k", [0, 1]), ("v", [4]), ("n", [0]), ("n", [1])]


def test_survival_is_the_variance_that_is_left(known):
    """1 of a node that reads only the embedding; 0 of one that no longer varies."""
    nodes, contexts = nodes_of(known), some_contexts(300)
    share = survival(nodes, contexts, gates_of(nodes, KNOWN))
    assert share["0.attn.attn_in"][0] == 1.0 and share["0.attn.attn_out"][6] > 0.99
    assert abs(survival(nodes, contexts, gates_of(nodes, {}))["0.attn.attn_out"][6]) < 1e-5


def test_the_rest_can_be_ablated_otherwise(known):
    """At zero as zeros do it; where nothing is outside, nothing changes; where all is, all that is left is
    what the other text says."""
    nodes, contexts = nodes_of(known), some_contexts(60)
    text = some_contexts(90, seed=4)
    ones, gates = torch.ones(nodes.number), gates_of(nodes, KNOWN)
    whole = asked.result(nodes.judge(contexts, ones))
    for found in asked.rest_otherwise(nodes, ones, contexts, text, (1.0, 0.0), 0).values():
        assert found == pytest.approx(whole, abs=1e-5)
    found = asked.rest_otherwise(nodes, gates, contexts, text, (1.0, 0.0), 0)
    zero = asked.result(nodes_of(known, "zero").judge(contexts, gates))
    assert len(found) == 4 and found["at zero"] == pytest.approx(zero, abs=1e-5)
    assert [r["accuracy"] > 0.9 for r in found.values()] == [False, True, True, True]  # its query is outside
    nothing = asked.rest_otherwise(nodes, 0 * ones, contexts, text, (1.0, 0.0), 0)
    assert all(0.3 < r["accuracy"] < 0.7 for r in nothing.values())
    assert nothing["as in another context of the task"] != (
        nothing["from another context for each node and token"])
    moved = asked.rest_otherwise(nodes, 0 * ones, contexts, replace_idx(text, contexts.idx), (1.0, 0.0), 0)
    assert moved["as in any text"] != nothing["as in any text"]


def test_the_rest_is_lent_by_contexts_that_are_no_shorter(known, monkeypatch):
    """And never by a context itself, nor by what fills it up; folded nodes stay what they always are."""
    nodes, contexts = nodes_of(known).with_value("0.attn.attn_q", 0, 7.0), some_contexts(60)
    contexts.last[::2], contexts.last[::3] = T - 3, T - 4
    contexts.idx[torch.arange(T) > contexts.last[:, None]] = 15  # which is nowhere else, and like no other
    known.transformer.wte.weight[15] = 9.0
    lent, used = [], []
    original = Nodes.logits

    def logits(nodes, contexts, gates, watch=None, instead=None, **how):
        if watch:
            lent.append(contexts)
        if instead:
            used.append((contexts, instead))
        return original(nodes, contexts, gates, watch=watch, instead=instead, **how)

    monkeypatch.setattr(Nodes, "logits", logits)
    text = some_contexts(90, seed=4)
    asked.rest_otherwise(nodes, gates_of(nodes, KNOWN), contexts, text, (1.0, 0.0), 0)
    others, _, mixed = lent
    assert (others.last >= contexts.last).all() and (others.last > contexts.last).any()
    assert not (others.idx == contexts.idx).all(1).any()
    assert all((values["0.attn.attn_q"][..., 0] == 7).all() for _, values in used)
    there, real = {}, torch.arange(T) <= mixed.last[:, None]
    original(nodes, mixed, torch.ones(nodes.number), watch=there.__setitem__)
    for t in range(T):  # what is lent at a token is what some context has there
        read = there["0.attn.attn_in"][real[:, t], t]
        assert torch.isin(used[3][1]["0.attn.attn_in"][:, t], read).all()


def replace_idx(contexts, idx):
    return Contexts(idx, contexts.last[:len(idx)], contexts.answers[:len(idx)])


def test_random_edges_are_as_many_as_the_circuits(known):
    """With all the nodes that they join, and no other edge between these."""
    nodes, contexts = nodes_of(known), some_contexts(40)
    inside, gates, _ = search.needed(nodes, gates_of(nodes, KNOWN), contexts, 0.15)
    drawn = asked.random_edges(nodes, count(inside, gates)["edges"], contexts, contexts, 0)
    assert [draw["edges"] for draw in drawn] == [3] * asked.DRAWS
    assert all(2 <= draw["nodes"] <= 6 and draw["weights"] >= 3 for draw in drawn)
    assert len({draw["loss"] for draw in drawn}) > 1


def test_a_node_of_the_twin_takes_its_answer_along(known):
    """The value does, and no other of its site; a context without a twin is left out."""
    nodes, one = nodes_of(known), some_contexts(40)
    twin = one.idx.clone()
    twin[(one.idx == A)], twin[(one.idx == B)] = B, A
    contexts = Contexts(torch.cat([one.idx, twin, some_contexts(3, seed=5).idx]),
                        torch.full((83,), T - 1), torch.cat([one.answers, one.answers.flip(1),
                                                             some_contexts(3, seed=5).answers]))
    rows, others = asked.twins(contexts)
    assert rows.tolist()[:80] == list(range(80)) and others.tolist()[:40] == list(range(40, 80))
    found = {r["site"]: r for r in asked.exchanges(nodes, gates_of(nodes, KNOWN), contexts)}
    value = found["0.attn.attn_v"]
    assert value["twins"] == len(rows) >= 80 and value["kept"] > 0.95 and value["others"] < 0.05
    assert found["0.attn.attn_k"]["kept"] < 0.05  # the capitals say the same to the key
    assert asked.exchanges(nodes, gates_of(nodes, KNOWN), some_contexts(6)) == []


def test_simple_rules_are_counted_on_the_text():
    """Which first character is the more frequent, which came last; a tie is half right."""
    class Letters:
        def decode(self, ids):
            return "".join("ab'\")"[i] for i in ids)

    contexts = Contexts(torch.tensor([[2, 2, 3, 0], [3, 0, 2, 1], [0, 1, 0, 0], [2, 3, 2, 3]]),
                        torch.tensor([3, 3, 1, 2]), torch.tensor([[2, 3], [3, 2], [2, 3], [2, 3]]))
    found = asked.simple_rules(contexts, Letters())
    assert found == {"is more frequent": (1 + 0.5 + 0.5 + 1) / 4, "came last": (0 + 0 + 0.5 + 1) / 4}
    same = Contexts(contexts.idx, contexts.last, torch.tensor([[0, 0]] * 4))
    assert asked.simple_rules(same, Letters()) == {}


def test_of_all_tokens_the_likeliest_is_asked_for(known):
    """The known model says X or Y, unless a bigram says something else."""
    nodes, contexts = nodes_of(known), some_contexts(40)
    known.lm_head.weight[:] = 0
    known.lm_head.weight[[X, Y], 6] = torch.tensor([0.75, -0.75])
    ones = torch.ones(nodes.number)
    assert asked.first_of_all(nodes, ones, contexts) == 1
    known.bigram_table[E, 9] = 50.0
    assert asked.first_of_all(nodes, ones, contexts) == 0


def test_a_heads_table_says_what_it_finds(known):
    """The capitals, with their values, what they add to either answer, and how far back they are."""
    class Letters:
        def decode_single_token_bytes(self, i):
            return b"ABabEXYhijklmnop"[i:i + 1]

    nodes, contexts = nodes_of(known), some_contexts(200)
    gates = gates_of(nodes, KNOWN)
    [(head, found)] = asked.heads_of(nodes, gates, contexts, Letters()).items()
    rows = {row[0]: row for row in found["tokens"]}
    assert (head, found["channels"], {row[0] for row in found["tokens"][:2]}) == ("0.0", [0], {"A", "B"})
    assert rows["A"][1] > 0.8 and rows["A"][2][0] > 1 and rows["A"][3] > 1 > -1 > rows["B"][3]
    assert rows["A"][4] == int((contexts.idx == A).sum())
    assert found["distance"][0][0] == 2 and all(0 <= share <= 1 for _, share in found["distance"])


def test_a_heads_table_is_counted_place_by_place(known):
    """With two heads, of which each has its own values, and texts of two lengths."""
    class Letters:
        def decode_single_token_bytes(self, i):
            return b"ABabEXYhijklmnop"[i:i + 1]

    known.lm_head.weight[X, 1] = 0.5
    nodes, contexts, seen, streams = nodes_of(known), asked.exchanged(some_contexts(40)), {}, []
    contexts.last[::2] = 8
    contexts.answers[1:] = contexts.answers[1:].flip(0)
    gates = gates_of(nodes, KNOWN | {"0.attn.attn_v": [0, 4], "0.attn.attn_out": [1, 6]})
    with hooks([(known.transformer.ln_f, streams.append)], before=True):
        nodes.logits(contexts, gates, watch=seen.__setitem__)
    rms = streams[0].square().mean(-1).sqrt().mean().item()
    toward = known.lm_head.weight[X] - known.lm_head.weight[Y]
    out = known.transformer.h[0].attn.c_proj.weight
    found = asked.heads_of(nodes, gates, contexts, Letters())
    assert {head: of["channels"] for head, of in found.items()} == {"0.0": [0], "0.2": [4]}
    for head, c in ((0, 0), (2, 4)):
        attention, at = nodes.attention(contexts, gates, 0)[:, head], {}
        values = seen["0.attn.attn_v"][:, :, c]
        unit = float(out[1, c] * toward[1] + out[6, c] * toward[6]) / rms
        for row, last in enumerate(contexts.last.tolist()):
            for t in range(last + 1):
                at.setdefault("ABabEXYhijklmnop"[contexts.idx[row, t]], []).append(
                    (last - t, attention[row, t].item(), values[row, t].item()))
        first = max(at, key=lambda token: sum(share for _, share, _ in at[token]))
        tokens = found[f"0.{head}"]["tokens"]
        assert [sum(share for _, share, _ in at[token]) for token, *_ in tokens] == pytest.approx(sorted(
            (sum(share for _, share, _ in places) for places in at.values()), reverse=True)[:asked.LISTED])
        for token, share, (value,), adds, times in tokens:
            _, shares, mine = zip(*at[token], strict=True)
            assert (share, value, adds, times) == pytest.approx(
                (np.mean(shares), np.mean(mine), np.mean(mine) * unit, len(mine)), abs=1e-4)
        steps = {far: [share for back, share, _ in at[first] if near <= back < far]
                 for near, far in itertools.pairwise((0, *asked.FARTHEST))}
        assert dict(found[f"0.{head}"]["distance"]) == pytest.approx(
            {far: np.mean(shares) for far, shares in steps.items() if shares}, abs=1e-4)


def test_an_intervention_changes_a_gate(known):
    """To 0 or to -1, in the whole model and in the circuit, where the fit goes with it; and the attention to
    what is attended to most when nothing is done."""
    nodes, contexts, fit = nodes_of(known), some_contexts(41), (0.5, 3.0)
    gates, ones, sides = gates_of(nodes, KNOWN), torch.ones(nodes.number), contexts.sides()
    untouched = nodes.attention(contexts, ones, 0)[:, 0]
    for record in asked.interventions(nodes, gates, contexts, fit):
        for (what, value), (where, before) in itertools.product(
                (("removed", 0), ("reversed", -1)), (("whole", ones), ("circuit", gates))):
            after = before.clone()
            after[nodes.places[record["site"]]] = value  # channel 0 of either
            logits = nodes.judge(contexts, after)
            logits = search.apply_fit(logits, sides, *fit) if where == "circuit" else logits
            assert record[f"{what}_in_{where}"] == asked.result(logits) | {"accuracy_of_each": [
                asked.result(logits[sides == side])["accuracy"] for side in (1, -1)]}
            if where == "whole" and record["site"].endswith("k"):
                look, top = nodes.attention(contexts, after, 0)[:, 0], untouched.argmax(1, keepdim=True)
                assert record[f"attention_{what}"] == look.gather(1, top).mean().item()


def test_twins_end_alike_and_are_of_the_other_answer():
    """And differ in three tokens at most; of several the one that differs least."""
    text = torch.tensor([[1, 2, 3, 4, 5, 9]] * 6)
    text[1, :3], text[2, :4], text[3, :2] = 7, 7, 8
    last, right, wrong = torch.tensor([5, 5, 5, 5, 4, 5]), [5, 6], [6, 5]
    contexts = Contexts(text, last, torch.tensor([right, wrong, wrong, wrong, wrong, right]))
    rows, others = asked.twins(contexts)
    assert list(zip(rows.tolist(), others.tolist(), strict=True)) == [(0, 3), (1, 0), (3, 0), (5, 3)]


def test_nonsense_is_consistent(known):
    """Answers exchanged are exchanged everywhere; those of another task go by its sides."""
    contexts = some_contexts(20)
    assert torch.equal(asked.exchanged(contexts).answers, contexts.answers.flip(1))
    other = Contexts(contexts.idx, contexts.last, torch.tensor([[9, 8], [8, 9]] * 10))
    after = asked.asked_after(other, contexts)
    assert torch.equal(after.sides(), other.sides()) and after.answers.unique().tolist() == [X, Y]
    _, runs = found_in(known, [asked.exchanged(c) for c in (some_contexts(512), some_contexts(64, seed=1))])
    assert [found["nodes"] for found in runs] == [None] * 2


def test_a_task_that_needs_no_circuit_is_warned_of(known, capsys):
    """Where the last token alone reaches the target; at the edge of the penalties; of a circuit that is
    large, does not carry over, or was chosen by few contexts."""
    nodes, contexts = nodes_of(known), some_contexts(64)
    sets, chosen_by_few = [None, some_contexts(128), contexts], [None, some_contexts(8), contexts]
    contexts.idx[:, -1] = torch.where(contexts.answers[:, 0] == X, 7, 8)
    train = np.tile([7, X, 8, Y], 50)
    known.bigram_table[7, X] = known.bigram_table[8, Y] = 8
    asked.check_able("a task", nodes, train, contexts, 0.15, True)
    assert capsys.readouterr().out.count("alone reaches the target") == 2
    runs = [{"penalty": p} for p in (1e-3, 1e-2)]
    few, many = gates_of(nodes, {"0.attn.attn_k": [0]}), torch.ones(nodes.number)
    assert not list(asked.warnings_of(nodes, [*runs, {"penalty": 1e-1}], runs[1], few, sets, 0.2, 0.15))
    assert [line.split(":")[0] for line in asked.warnings_of(
        nodes, [*runs, {"penalty": 1e-1}], runs[1], few, chosen_by_few, 0.23, 0.15)] == [
            "the circuit is worse where it is judged", "only 8 contexts chose the size and the fit"]
    found = asked.warnings_of(nodes, runs, runs[1], many, sets, 0.2, 0.15)
    assert [line.split(",")[0] for line in found] == [
        "the best penalty", "the circuit has more than a tenth of all nodes: it explains little"]


def test_a_task_is_no_nonsense_of_its_own(task, capsys):
    """Asked after its own contexts the answers are what they were: that control is left out, and said so."""
    task(answers=["r", "t"], target_loss=5.0)
    assert run(f"circuit.py --task=task.json --nonsense_task=task.json --page=False {SMALL}") == 0
    assert "without the control of nonsense_task: it is the task itself" in capsys.readouterr().out
    assert "another_task" not in json.loads(read("out/circuits/task/circuit.json"))["results"]


def test_the_mask_seeds_of_the_best_penalty_are_compared(known):
    """Nodes of both over nodes of either, of those that reached the target; of all, how many did not. The
    smallest may be the one run of another penalty."""
    nodes = nodes_of(known)
    first, second, other = (gates_of(nodes, {"0.attn.attn_in": channels})
                            for channels in ([0, 1], [1, 2, 3], [0]))
    runs = [{"penalty": p, "nodes": n, "gates": gates} for p, n, gates in (
        (1e-2, 2, first), (1e-2, None, other), (1e-2, 3, second), (1e-3, 1, other), (1e-1, None, other))]
    assert asked.seeds_agree(nodes, runs) == {
        "penalty": 1e-2, "nodes": [2, 3], "weights": [0, 0], "overlaps": [0.25], "failed": 2, "of": 5}


def test_searches_with_something_destroyed(known, monkeypatch):
    """Each has labels, contexts or weights of its own; reported is the smallest of its circuits, fitted on
    the contexts that chose it, judged by the others."""
    sets, trials = [some_contexts(40, seed=seed) for seed in range(3)], [(1e-2, 0), (1e-2, 1), (1e-2, 2)]
    others = [Contexts(c.idx, c.last, torch.tensor([[9, 8], [8, 9]] * 20)) for c in sets]
    nodes, seen = nodes_of(known), []
    small, large = gates_of(nodes, KNOWN), torch.ones(nodes.number)
    runs = [{"nodes": None, "lowest_loss": 0.3, "gates": 0 * small}, {"nodes": 9, "lowest_loss": 0.1,
            "gates": large}, {"nodes": 5, "lowest_loss": 0.2, "gates": small}]
    monkeypatch.setattr(asked, "find", lambda nodes, learning, choosing, target, how, name, trials: (
        seen.append((nodes, learning, choosing, trials)), runs)[1])
    inside = nodes.with_edges([edge[:4] for edge in nodes.edges_in(small)])
    found = dict(asked.searches(inside, nodes_of, sets, others, 0.15, search.Search(), trials, 0))
    assert list(found) == ["labels_shuffled", "answers_exchanged", "another_task", "weights_drawn_anew",
                           "weights_shuffled"]
    expected = asked.fitted(nodes, small, asked.exchanged(sets[1]), asked.exchanged(sets[2]))
    assert found["answers_exchanged"] == {"reached": 2, "of": 3, "lowest_loss": 0.2} | expected | count(
        nodes, small)
    for (other, *used, tried), name in zip(seen, found, strict=True):
        assert tried == trials and not other.edges and (other.model is known) == ("weights" not in name)
        for mine, contexts in zip(used, sets, strict=False):
            assert torch.equal(mine.answers, contexts.answers) == ("weights" in name)
    failed = runs[0] | {"lowest_loss": 0.4, "gates": large}
    runs[:] = [failed, runs[0]]
    assert asked.search_again("", nodes, sets, 0.15, search.Search(), trials)["lowest_loss"] == 0.3
    runs[:] = [failed | {"nodes": 5, "gates": small}]
    again = asked.search_again("", nodes, sets, 0.15, search.Search(), trials)["loss"]
    assert again == asked.fitted(nodes, small, *sets[1:])["loss"] != asked.fitted(
        nodes, small, sets[2], sets[2])["loss"]


def test_controls_are_of_the_circuit_with_its_fit(known):
    """The rest without the circuit, as many random nodes and all but these, judged by contexts that chose
    nothing; what is asked of the circuit itself goes by the fit that it has."""
    nodes, choosing, judging = nodes_of(known), some_contexts(30), some_contexts(50, seed=1)
    judging.idx[:5, 1:-1] = 2  # some say nothing
    gates, fit = gates_of(nodes, KNOWN), (1.0, 9.0)  # with which it nearly always says X
    sets, beyond = [None, choosing, judging], {"ordinary text": judging}
    found = asked.without_searches(nodes, gates, nodes, sets, beyond, fit, 0)
    assert asked.agreement(nodes, gates, judging, fit) != asked.agreement(nodes, gates, judging)
    assert found["without"]["loss"] == asked.result(nodes.judge(judging, 1 - gates))["loss"]
    for name, kept in (("without_fitted", 1 - gates), ("nothing_fitted", 0 * gates)):
        assert found[name] == asked.fitted(nodes, kept, choosing, judging)
    assert [draw["nodes"] for draw in found["random"]] == [5] * asked.DRAWS
    assert [draw["nodes"] for draw in found["without_random"]] == [nodes.number - 5] * asked.DRAWS
    expected = asked.agreement(nodes, gates, judging, fit)
    assert found["beyond"]["ordinary text"]["circuit"] == expected
    assert {key: found["faithfulness"][key] for key in expected} == expected
    assert found["interventions"] == asked.interventions(nodes, gates, judging, fit)
    assert found["otherwise"] == asked.rest_otherwise(nodes, gates, judging, judging, fit, 0)
    assert max(draw["accuracy"] for draw in found["otherwise"].values()) < 0.7 < asked.result(
        nodes.judge(judging, gates))["accuracy"]


def test_weights_of_the_embedding_are_counted_one_by_one():
    """Of tokens and positions that occur, where a kept node reads; of the answers, where one writes."""
    model = tiny_model(vocab_size=16, use_positional_embeddings=True).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    wpe = model.transformer.wpe.weight
    for weight in (model.transformer.wte.weight, wpe, model.lm_head.weight):
        weight.mul_(torch.rand(weight.shape, generator=generator) < 0.5)
    nodes = Nodes(model, *means_over(model, some_tokens(2, 8)))
    contexts = Contexts(torch.tensor([[1, 2, 9, 9], [3, 2, 1, 4]]), torch.tensor([1, 3]),
                        torch.tensor([[5, 6]] * 2))
    kept = {"0.attn.attn_in": [0, 2], "0.mlp.mlp_in": [2, 3], "0.attn.attn_out": [1, 4, 5]}
    wte, head = model.transformer.wte.weight, model.lm_head.weight
    wte[4] = 1  # which only ends a text
    assert asked.embedding_weights(nodes, gates_of(nodes, kept), contexts) == {
        "embedding_of_tokens": sum(wte[t, c].item() != 0 for t in (1, 2, 3, 4) for c in (0, 2, 3)),
        "embedding_of_positions": sum(wpe[t, c].item() != 0 for t in range(4) for c in (0, 2, 3)),
        "unembedding_of_answers": sum(head[t, c].item() != 0 for t in (5, 6) for c in (1, 4, 5))}


def test_several_draws_are_a_row_of_the_table():
    """From the least to the largest, in whatever order they came."""
    draws = [{"loss": loss, "accuracy": share, "nodes": 5} for loss, share in (
        (0.5, 0.6), (0.7, 0.9), (0.6, 0.5))]
    [row, other] = report.table_of({"random": draws, "labels_shuffled": draws[0] | {"reached": 1, "of": 3}})
    assert row == ["random nodes", "0.500 to 0.700", "50.0% to 90.0%", "5", "", ""]
    assert other == ["labels shuffled", "0.500", "60.0%", "5", "", "1 of 3 reached"]


# ----------------------------------------------------------------------------------------------------------
# the picture


def test_of_a_large_circuit_the_strongest_edges_are_drawn(monkeypatch):
    """By weight times the spread of what they read, whatever the sign, with the nodes that they join alone;
    a smaller circuit is drawn as it is."""
    a, v, o, m = "0.attn.attn_in", "0.attn.attn_v", "0.attn.attn_out", "0.mlp.mlp_in"
    edges = [[v, 0, o, 5, 1.0], [a, 0, v, 0, -3.0], [a, 1, v, 1, 2.0], [v, 1, o, 6, 0.5]]
    spread = {f"{a}.0": 1.0, f"{a}.1": 1.0, f"{v}.0": 0.1, f"{v}.1": 10.0, f"{o}.5": 9.0, f"{o}.6": 9.0}
    record = {"nodes": {a: [0, 1], v: [0, 1], o: [5, 6], m: [5]}, "task": "a task", "picture": {
        "edges": edges, "spread": spread,
        "stream": [[o, 6, a, 0, 1.0], [o, 6, m, 5, 1.0], [o, 5, a, 0, 1.0]],
        "answer_edges": [[o, 5, 0, 1.0], [o, 6, 1, 1.0]]}}
    monkeypatch.setattr(picture, "STRONGEST", 4)
    assert picture.strongest(record) == (record, 0)
    monkeypatch.setattr(picture, "STRONGEST", 2)
    found, left_out = picture.strongest(record)
    assert found == {"nodes": {a: [0], v: [0, 1], o: [6]}, "task": "a task", "picture": {
        "edges": [edges[3], edges[1]], "spread": spread, "stream": [[o, 6, a, 0, 1.0]],
        "answer_edges": [[o, 6, 1, 1.0]]}} and left_out == 2


@pytest.mark.parametrize("kept", [True, False])
def test_a_query_that_is_not_drawn_is_not_called_constant(kept, monkeypatch):
    """Of a kept key the picture says what its query stays at, unless that varies: also where the query's own
    edges are too weak to be drawn."""
    a, q, k = (f"0.attn.attn_{name}" for name in ("in", "q", "k"))
    edges = [[a, 0, k, 3, 2.0], *[[a, 0, q, 3, 1.0]] * kept]
    nodes = {a: [0], k: [3], **({q: [3]} if kept else {})}
    record = {"nodes": nodes, "means": {q: [0.0, 0.0, 0.0, 1.5]}, "picture": {
        "edges": edges, "stream": [], "answer_edges": [], "d_head": 4, "extremes": {}, "tokens": {},
        "spread": {f"{site}.{c}": 1.0 for site, channels in nodes.items() for c in channels}}}
    monkeypatch.setattr(picture, "STRONGEST", 1)
    shown, _ = picture.strongest(record)
    _, axis = new_figure(4, 4)
    picture.draw_nodes(axis, shown, picture.place_nodes(shown))
    drawn = [text.get_text() for text in axis.texts if text.get_text().startswith("key")]
    assert drawn == ["key 3, head 0" + "\nits query stays at +1.5" * (not kept)]


def test_the_table_in_the_picture_has_a_line_for_a_token():
    """Share of attention, what it adds to the first answer, values; of few heads, tokens and channels. A
    token that adds nothing comes last."""
    tokens = [[f"t{i}", i / 8, [i + c / 10 for c in range(6)], -i / 2, 3] for i in range(8)]
    heads = {f"0.{h}": {"channels": list(range(10, 16)), "tokens": tokens} for h in range(5)}
    head, *lines = picture.heads_table(heads, ["X", "Y"]).splitlines()
    assert "adds to X" in head and head.index("attention") < head.index("adds") < head.index("values")
    assert [line.split() for line in lines if "by head" in line] == [
        ["by", "head", f"{h}", "of", "block", "0", *map(str, range(10, 10 + picture.VALUES))]
        for h in range(picture.HEADS)]
    rows = [line.split() for line in lines if "by head" not in line]
    assert [token for token, *_ in rows] == [f"t{i}" for i in range(1, picture.ROWS + 1)] * picture.HEADS
    listed = tokens[1:picture.ROWS + 1] * picture.HEADS
    for row, (token, share, values, adds, _) in zip(rows, listed, strict=True):
        assert row[0] == token and [float(x) for x in row[1:]] == pytest.approx(
            [share, adds, *values[:picture.VALUES]], abs=0.006)
    assert picture.heads_table({}, ["X", "Y"]) == ""


def test_the_stream_joins_what_is_written_with_what_reads_it_later():
    """At the same channel of a later site, with the gain of the norm before that site."""
    model = tiny_model(n_layer=2).eval().requires_grad_(False)
    for block in model.transformer.h:
        for norm in (block.ln_1, block.ln_2):
            norm.weight.copy_(torch.rand(len(norm.weight)))
    nodes = Nodes(model, *means_over(model, some_tokens(2, 8)))
    found = picture.stream_of(nodes, {
        "0.attn.attn_in": [3], "0.attn.attn_out": [3], "0.mlp.mlp_in": [3, 4], "0.mlp.mlp_out": [4],
        "1.attn.attn_in": [3, 4]})
    first, second = model.transformer.h
    assert sorted(found) == [["0.attn.attn_out", 3, "0.mlp.mlp_in", 3, first.ln_2.weight[3].item()],
                             ["0.attn.attn_out", 3, "1.attn.attn_in", 3, second.ln_1.weight[3].item()],
                             ["0.mlp.mlp_out", 4, "1.attn.attn_in", 4, second.ln_1.weight[4].item()]]


def test_what_is_drawn_of_a_node_is_counted_token_by_token(known):
    """Of a key its mean at each token that occurs three times, of a value the sum of what attention takes.
    And examples of either answer, as sure as half of them with the fit."""
    class Letters:
        def decode_single_token_bytes(self, i):
            return b"ABabEXYhijklmnop"[i:i + 1]

    nodes, contexts = nodes_of(known), some_contexts(40)
    contexts.idx[0, 1] = 15  # once: too rare for a mean
    known.transformer.wte.weight[15, 3] = 1
    gates, scale = gates_of(nodes, KNOWN), 0.5
    found = picture.describe(nodes, gates, contexts, Letters(), (scale, 1.0))
    seen = {}
    nodes.logits(contexts, gates, watch=seen.__setitem__)
    attention, at = nodes.attention(contexts, gates, 0)[:, 0], {}
    for row, text in enumerate(contexts.idx.tolist()):
        for t, token in enumerate(text):
            at.setdefault("ABabEXYhijklmnop"[token], []).append((
                seen["0.attn.attn_k"][row, t, 0].item(),
                seen["0.attn.attn_v"][row, t, 0].item() * attention[row, t].item()))
    means = {token: np.mean([k for k, _ in x]) for token, x in at.items() if len(x) > 2}
    sums = {token: sum(v for _, v in x) for token, x in at.items()}
    assert len(means) == len(sums) - 1
    for site, numbers in (("0.attn.attn_k.0", means), ("0.attn.attn_v.0", sums)):
        shown = dict(found["extremes"][site])
        assert shown == pytest.approx({token: numbers[token] for token in shown}, abs=1e-4)
        numbers = {token: x for token, x in numbers.items() if x}
        assert {max(numbers, key=numbers.get), min(numbers, key=numbers.get)} <= shown.keys()
    margins = scale * -nodes.judge(contexts, gates).diff(dim=1)[:, 0] + contexts.sides()
    for side, answer in ((1, "X"), (-1, "Y")):
        mine = margins[contexts.sides() == side]
        shown = [example["margin"] for example in found["examples"] if example["right"] == answer]
        assert len(shown) == picture.EXAMPLES and max(abs(m - mine.median()) for m in shown) <= (
            mine - mine.median()).abs().sort().values[picture.EXAMPLES - 1] + 1e-4


# ----------------------------------------------------------------------------------------------------------
# the command


SMALL = ("--steps=3 --mask_seeds=1 --penalties=1e-3 --batch_size=4 --choosing_contexts=32 "
         "--judging_contexts=40 --mean_windows=4 --device=cpu")


@pytest.fixture
def task(trained):
    """task(**spec), or task(whole), writes task.json, in a folder with a run; or another name."""
    def write(*whole, name="task", **spec):
        with open(f"{name}.json", "w", encoding="utf-8") as f:
            json.dump(*whole or [spec], f)

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
        assert all(val[p] == record["answer_ids"][right] for p in positions)
        idx = torch.tensor(np.stack([val[p - length:p] for p in positions]))
        logits = model(idx)[0][:, -1, record["answer_ids"]].detach()
        losses += (logits.logsumexp(1) - logits[:, right]).tolist()
    return np.mean(losses), len(losses)


def test_a_circuit_can_be_computed_again_from_its_file(task, capsys):
    """Its loss by a few hooks on the named modules; with the controls beside it, and the picture."""
    task(name="another", answers=["e", "t"])
    task(answers=["r", "t"], target_loss=5.0, beyond=["another.json"])
    assert run(f"circuit.py --task=task.json {SMALL}") == 0
    record = json.loads(read("out/circuits/task/circuit.json"))
    results, printed = record["results"], capsys.readouterr().out
    assert loss_with_hooks(record) == (pytest.approx(results["circuit"]["loss"], rel=1e-4), 40)
    assert {"whole", "circuit", "without", "nothing", "random_order", "bigram_table", "last_token",
            "labels_shuffled", "weights_drawn_anew"} <= results.keys()
    assert list(results["beyond"]) == ["random order", "another", "ordinary text"]
    # not all: a share of few contexts may be the same by chance, as with torch 2.6
    assert any(x["circuit"] != x["nothing"] for x in results["beyond"].values())
    assert sum(len(channels) for channels in record["nodes"].values()) == results["circuit"]["nodes"]
    assert f"{results['circuit']['loss']:.3f}" in printed and "does not prove" in printed
    with open("out/circuits/task/circuit.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"


def circuit_of_task(flags=""):
    """What circuit.py writes without controls, less the seconds."""
    assert run(f"circuit.py --task=task.json --controls=False {SMALL} {flags}") == 0
    record = json.loads(read("out/circuits/task/circuit.json"))
    assert record.pop("seconds") > 0
    return record


def test_the_same_seed_gives_the_same_circuit(task):
    """And the same results."""
    task(answers=["r", "t"], target_loss=5.0)
    assert circuit_of_task() == circuit_of_task()


@pytest.mark.parametrize("fit", [True, False])
def test_what_chooses_does_not_judge(task, monkeypatch, fit):
    """What is reported comes from contexts of val; the circuit, its fit and what its parts cost from those
    of train that choose. The controls are of what was found; a target on the command line is the one."""
    task(answers=["r", "t"], target_loss=5.0)
    seen = {}

    def watch(owner, name, replaced=None):
        original = replaced or getattr(owner, name)

        def watched(*arguments):
            seen[name] = arguments, original(*arguments)
            return seen[name][1]
        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((search, "find"), (picture, "describe"), (asked, "check_able")):
        watch(owner, name)
    smallest = search.smallest

    def with_a_bias(*arguments):  # as if a query had been folded
        run, inside, *rest = smallest(*arguments)
        return run, inside.with_value("0.attn.attn_q", 0, 7.0), *rest

    watch(search, "smallest", with_a_bias)
    watch(asked, "without_searches", lambda *_: {})
    watch(asked, "searches", lambda *_: ())
    small = SMALL.replace("--mask_seeds=1", "--mask_seeds=2")
    flags = f"--fit={fit} --target_loss=6 --nonsense_task= --page=False"
    assert run(f"circuit.py --task=task.json {small} {flags}") == 0
    record = json.loads(read("out/circuits/task/circuit.json"))
    (nodes, learning, choosing, target, *_), _ = seen["find"]
    arguments, (chosen, inside, gates, path) = seen["smallest"]
    (_, _, judging, _, fitted), _ = seen["describe"]
    assert (len(learning), len(choosing), len(judging)) == (30, 14, 40)  # of 12 + 32 a third to choose by
    assert target == arguments[3] == 6
    assert arguments[2] is choosing and arguments[-1] == seen["check_able"][0][5] == fit
    assert fitted == (record["scale"], record["shift"]) == seen["without_searches"][0][5] == (
        search.fit_of(inside.judge(choosing, gates), choosing.sides()) if fit else (1.0, 0.0))
    results, ones = record["results"], torch.ones(nodes.number)
    for name, *circuit in (("circuit_fitted", inside, gates), ("found_fitted", nodes, chosen["gates"]),
                           ("whole_fitted", nodes, ones)):
        assert results[name] == pytest.approx(asked.fitted(*circuit, choosing, judging))
    for site, values in inside.ablated.items():
        assert record["means"][site] == values.tolist()
    assert record["means"]["0.attn.attn_q"][0] == 7
    costs = search.costs_of(inside, gates, choosing, path[-1][2], fit)
    assert {key: record[key] for key in costs} == costs
    assert [(run["penalty"], run["mask_seed"]) for run in record["runs"]] == seen["searches"][0][6] == [
        (1e-3, 0), (1e-3, 1)]


def test_ctrl_c_in_the_controls_keeps_the_circuit(task, capsys, monkeypatch):
    """It is written with the controls that were made, and says that others are missing; then the script ends
    as Ctrl-C ends it."""
    task(answers=["r", "t"], target_loss=5.0)
    destroy = asked.shuffled_weights

    def interrupt(*_):  # also where the tests run in the background, which ignores the signal
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    monkeypatch.setattr(asked, "shuffled_weights", interrupt)
    assert run(f"circuit.py --task=task.json --nonsense_task= {SMALL}") == 130
    stopped, captured = json.loads(read("out/circuits/task/circuit.json")), capsys.readouterr()
    [warning] = [line for line in stopped["warnings"] if "Ctrl-C" in line]
    assert warning in captured.out and warning in read("out/circuits/task/circuit.html")
    assert not captured.err and os.path.exists("out/circuits/task/circuit.png")
    monkeypatch.setattr(asked, "shuffled_weights", destroy)
    assert run(f"circuit.py --task=task.json --nonsense_task= {SMALL}") == 0
    whole = json.loads(read("out/circuits/task/circuit.json"))
    missing = whole["results"].pop("weights_shuffled")
    assert missing and whole["results"] == stopped["results"]
    assert not any("Ctrl-C" in line for line in whole["warnings"])


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, ""), (RuntimeError("CUDA out of memory. Tried"), 2, "--batch_size")])
def test_a_search_that_cannot_end_is_no_traceback(task, capsys, monkeypatch, error, status, words):
    """Ctrl-C, and memory that does not suffice, for which it says what to do."""
    def find(*_):
        raise error

    task(answers=["r", "t"], target_loss=5.0)
    monkeypatch.setattr(search, "find", find)
    assert run(f"circuit.py --task=task.json {SMALL}") == status
    captured = capsys.readouterr().err
    assert captured.count("\n") == bool(words) and words in captured
    assert not os.path.exists("out/circuits/task/circuit.json")


def test_inputs_beyond_are_for_the_controls(task, capsys):
    """Without these a task that names some that are not there is no error."""
    task(answers=["r", "t"], target_loss=5.0, beyond=["nowhere"])
    assert circuit_of_task()["hard"] == {}
    assert "without inputs beyond the task: no task" in capsys.readouterr().out


def test_several_pairs_of_answers_are_said(task, capsys):
    """Table, picture and page have one of them, and name it as one."""
    pairs = ["ab", "ba", "cd", "dc", "fe", "ef"]
    prompts = [[f"{i:03} is{i % 7}", *pairs[i % 6]] for i in range(150)]
    task(prompts=prompts[:96], held_out=prompts[96:], target_loss=5.0)
    record, drawn = circuit_of_task(), []
    warning = "the task has 3 pairs of answers"
    assert record["picture"]["pairs"] == 3 and "".join(record["answers"]) in ("ab", "cd", "ef")
    assert warning in capsys.readouterr().out and warning in read("out/circuits/task/circuit.html")
    for record["picture"]["pairs"], words in ((3, "answers, one of 3 pairs"), (1, "answers")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(picture, "save", lambda figure, path: drawn.append(figure))
            picture.draw(record, "circuit.png")
        assert words in [text.get_text() for text in drawn[-1].axes[0].texts]


def test_a_node_that_never_varies_is_json(known):
    """The query of the known model is constant: what share of its variance is left has no number."""
    nodes, contexts = nodes_of(known), some_contexts(64)
    gates = gates_of(nodes, KNOWN | {"0.attn.attn_q": [0]})
    found = asked.without_searches(nodes, gates, nodes, [contexts] * 3, {"ordinary text": contexts},
                                   (1.0, 0.0), 0)
    assert found["survival"]["0.attn.attn_q"] == {0: None}
    assert json.loads(json.dumps(found, allow_nan=False))["survival"]["0.attn.attn_v"]["0"] > 0.5


def test_the_heads_table_names_the_answers(known, capsys):
    """Of which the one of the lower id is the first, whichever the task names first."""
    class Letters:
        def decode_single_token_bytes(self, i):
            return b"ABabEXYhijklmnop"[i:i + 1]

    contexts = asked.exchanged(some_contexts(200))
    nodes = nodes_of(known)
    report.print_heads(asked.heads_of(nodes, gates_of(nodes, KNOWN), contexts, Letters()))
    assert "adds to X against Y" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_what_a_font_lacks_is_drawn_as_an_escape(task):
    """Chinese, control characters, in tokens, answers and the name of a task: no box, and no warning."""
    task(answers=["r", "t"], target_loss=5.0)
    record, drawn = circuit_of_task(), []
    record["task"], record["picture"]["answers"] = "任务", ["中\x07", "é→"]
    for example in record["picture"]["examples"]:
        example["tokens"][0], example["right"] = "文\u202e", "\U00020000"
    for head in record["results"]["heads"].values():
        head["tokens"][0][0] = "\r中"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "save", lambda figure, path: drawn.append(figure) or save(figure, path))
        picture.draw(record, "circuit.png")
    [figure] = drawn
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert figure.get_suptitle().startswith("\\u4efb\\u52a1: ")
    assert {"\\u4e2d\\x07", "é→", "\\u6587\\u202e"} <= set(texts) and any("\\U00020000" in x for x in texts)
    assert all(ord(c) < 2**13 or c in "→⏎␣⇥\ufffd" for text in texts for c in text)


@pytest.mark.parametrize("merged, reason", [(5, False), (6, True)])
def test_most_prompts_must_be_other_tokens_to_be_the_reason(merged, reason):
    """Of ten, of which some end in the space that running text has with the answer."""
    words = {bytes([i]): i for i in range(256)} | {b" a": 256, b" b": 257}
    bpe = tiktoken.Encoding("bpe", pat_str=r" ?\w+|\s", mergeable_ranks=words, special_tokens={})
    prompts = [([258, *bpe.encode(f"{i} is" + " " * (i < merged))], [97, 98] if i < merged else [256, 257])
               for i in range(10)]
    assert bool(joined_otherwise({"prompts": prompts}, bpe)) == reason


@pytest.mark.parametrize("space, tokens", [(" ", True), ("", False)])
def test_a_prompt_that_ends_in_a_space_is_said_to(task, capsys, monkeypatch, space, tokens):
    """A model that fails at it may have read the space with the answer only: training further is no remedy.
    Where the tokens of prompt and answer are those of running text, it is."""
    merged = {bytes([i]): i for i in range(256)} | {b" a": 256, b" b": 257}
    bpe = tiktoken.Encoding("bpe", pat_str=r" ?\w+|\s", mergeable_ranks=merged,
                            special_tokens={"<|endoftext|>": 258})
    answers = [" a", " b"] if not space else ["a", "b"]
    prompts = [[f"{i:03}is{space}", *answers[::1 if i % 2 else -1]] for i in range(150)]
    task(prompts=prompts[:96], held_out=prompts[96:])
    reason = joined_otherwise(read_task("task.json", bpe), bpe)
    assert bool(reason) == tokens and (not tokens or "96 of its 96" in reason and "'000is '" in reason)
    nodes = nodes_of(tiny_model(vocab_size=16, block_size=T).eval().requires_grad_(False))
    contexts = some_contexts(64)
    with pytest.raises(SystemExit):
        asked.check_able("task", nodes, np.arange(16), contexts, 0.1, True, reason)
    error = capsys.readouterr().err
    assert ("train it further" in error) != tokens and ("before their last space" in error) == tokens


def test_contexts_contain_what_the_task_asks_for(task):
    """Both answers equally often."""
    task(answers=["r", "t"], contains="e", target_loss=5.0)
    record, val = circuit_of_task(), np.fromfile("data/tiny/val.bin", "<u2").astype("u1").tobytes()
    first, second = record["contexts"]["positions"]
    assert len(first) == len(second) >= 16
    assert all(b"e" in val[p - 16:p] for p in first + second)


def test_another_circuit_of_the_same_name_is_moved_aside(task, capsys):
    """Of another checkpoint, task file, target or setting of the search; the same search again replaces what
    it found, with fewer controls and without its page too."""
    task(answers=["r", "t"], target_loss=5.0)
    first = circuit_of_task()
    assert circuit_of_task() == first and os.listdir("out/circuits") == ["task"]
    circuit_of_task("--page=False")
    assert os.listdir("out/circuits") == ["task"]
    circuit_of_task("--ablation=zero")
    assert json.loads(read("out/circuits/task.previous-1/circuit.json"))["sha256"] == first["sha256"]
    task(answers=["r", "t"], target_loss=4.0)
    circuit_of_task("--ablation=zero")
    assert sorted(os.listdir("out/circuits")) == ["task", "task.previous-1", "task.previous-2"]
    assert "is now in out/circuits/task.previous-2" in capsys.readouterr().out
    flags = "--ablation=zero"
    for n, other in enumerate(("--target_loss=4.5", "--seed=1", "--fit=False"), start=3):
        flags += f" {other}"
        circuit_of_task(flags)
        assert os.path.exists(f"out/circuits/task.previous-{n}")


def test_a_folder_that_cannot_be_written_is_noticed_before_the_search(task, capsys):
    task(answers=["r", "t"], target_loss=5.0)
    with open("out/circuits", "w", encoding="utf-8"):
        pass
    assert run(f"circuit.py --task=task.json {SMALL}") == 2
    captured = capsys.readouterr()
    assert "cannot write to out/circuits/task" in captured.err and "penalty" not in captured.out


def test_a_model_that_cannot_do_the_task_moves_no_circuit(task):
    """What was found in an earlier checkpoint is where it was, as the new one has nothing to put there."""
    task(answers=["r", "t"], target_loss=5.0)
    circuit_of_task()
    before = tree("out")
    assert run(f"circuit.py --task=task.json --ablation=zero --target_loss=1e-9 {SMALL}") == 2
    assert tree("out") == before


def test_data_of_another_tokenizer_is_told_with_the_remedy_that_works(task, capsys):
    """Prepared with the tokenizer of the run, the data serves again; by the first command it would not."""
    task(answers=["r", "t"], target_loss=5.0)
    shutil.rmtree("data/tiny")
    shutil.copytree("data/other", "data/tiny")
    assert run(f"circuit.py --task=task.json {SMALL}") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "prepare it again with --tokenizer=out/tokenizer.json" in line
    remedy = line.split("prepare it again with ")[1]
    assert run(f"prepare.py --dataset='[0-9]*.txt' --name=tiny --val_fraction=0.2 {remedy}") == 0
    assert circuit_of_task()["dataset"] == "tiny"


def test_unseen_text_is_judged_too(task, tmp_path, capsys):
    """Of data with the same tokenizer; of other data it says what to do."""
    task(answers=["r", "t"], target_loss=5.0)
    other = tmp_path / "other"
    shutil.copytree("data/tiny", other)
    assert run(f"circuit.py --task=task.json {SMALL} --unseen={other}") == 0
    record = json.loads(read("out/circuits/task/circuit.json"))
    assert record["results"]["beyond"]["unseen files"]["circuit"]["right"] <= 1
    text = read(other / "tokenizer.json") + "\n"
    meta = json.loads(read(other / "meta.json"))
    meta["tokenizer_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    (other / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert run(f"circuit.py --task=task.json {SMALL} --unseen={other}") == 2
    assert "--tokenizer=data/tiny/tokenizer.json" in capsys.readouterr().err


def test_a_task_of_templates(task, monkeypatch):
    """Prompts to learn on, held-out ones to judge by; each answer is right as often, also in a part."""
    prompts = [[f"{'xy'[i % 3 > 0]}{i:03} is ", *("ab", "ba")[i % 3 > 0]] for i in range(150)]
    task(prompts=prompts[:96], held_out=prompts[96:], target_loss=5.0)
    seen, find = [], search.find
    monkeypatch.setattr(search, "find", lambda *args: seen.append(args[1:3]) or find(*args))
    record = circuit_of_task()
    assert [len(ids) for ids in record["contexts"]["ids"]] == [18, 18]
    assert [(len(part), int(part.sides().sum())) for part in seen[0]] == [(44, 0), (20, 0)]


def again(module, *flags):
    """What `python -m` of a module of circuits/ does."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("circuit", "image", "page"):
            patch.setattr(module, name, "", raising=False)
        patch.setattr("sys.argv", [module.__name__, *flags])
        module.main()


def test_picture_and_page_are_made_again_from_the_file(task, capsys):
    """The same bytes of the page; not with another checkpoint in its place."""
    task(answers=["r", "t"], target_loss=5.0)
    circuit_of_task()
    folder = "out/circuits/task"
    before = read(f"{folder}/circuit.html")
    os.remove(f"{folder}/circuit.png")
    os.remove(f"{folder}/circuit.html")
    again(picture, f"--circuit={folder}/circuit.json")
    again(page, f"--circuit={folder}/circuit.json")
    assert os.path.exists(f"{folder}/circuit.png") and read(f"{folder}/circuit.html") == before
    with open("out/ckpt.pt", "ab") as f:
        f.write(b" ")
    with pytest.raises(SystemExit):
        again(page, f"--circuit={folder}/circuit.json")
    assert "it is of another checkpoint than" in capsys.readouterr().err


@pytest.mark.parametrize("module", [picture, page])
@pytest.mark.parametrize("text, words", [
    ("{", "JSONDecodeError"), ("[" * 100_000, "RecursionError"), ("[]", "no JSON object"),
    ("{}", "(it lacks 'format')"), ('{"format": 1}', "(its format is 1, not 2)"),
    (None, "(No such file or directory)"),
    ('{"format": 2, "model": 7, "nodes": "x", "picture": 3}', "(it lacks 'task')|(TypeError: ")])
def test_a_file_that_is_no_circuit_is_one_line(module, text, words, tmp_path, capsys):
    """It names the file and what is wrong, however deep that is."""
    path = str(tmp_path / "circuit.json")
    if text is not None:
        (tmp_path / "circuit.json").write_text(text)
    with pytest.raises(SystemExit):
        again(module, f"--circuit={path}")
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot use circuit={path!r}")
    assert any(word in error for word in words.split("|"))
    assert error.count("\n") == 1 and len(error) < 500


@pytest.mark.parametrize("name", ["quotes", "quotes.json", "tasks/quotes", "tasks/quotes.json"])
def test_a_shipped_task_is_found_from_anywhere(name, tmp_path, monkeypatch):
    """By its name or by the path that it has in the repository; a file of one's own comes first."""
    monkeypatch.chdir(tmp_path)
    assert path_of(name) == os.path.join(REPO, "tasks", "quotes.json")
    mine = tmp_path / (name.removesuffix(".json") + ".json")
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("{}")
    assert os.path.samefile(path_of(name), mine)


def test_shipped_tasks_are_well_formed():
    """Each names two answers, or holds prompts; those held out are others; those beyond it exist."""
    names = [name for name in os.listdir(os.path.join(REPO, "tasks")) if name.endswith(".json")]
    assert len(names) >= 8
    for name in names:
        spec = json.loads(read(os.path.join(REPO, "tasks", name)))
        if "families" in spec:  # hard inputs of a task, which are no task
            continue
        assert spec.keys() <= {"answers", "contains", "prompts", "held_out", "target_loss", "beyond"}, name
        assert len(spec.get("answers", "ab")) == 2, name
        assert all(f"{other}.json" in names for other in spec.get("beyond", [])), name
        if "prompts" in spec:
            prompts, held_out = ({p for p, *_ in spec[part]} for part in ("prompts", "held_out"))
            assert not prompts & held_out and len(prompts) >= 48 and len(held_out) >= 16, name


@pytest.mark.parametrize("spec, flags, words", [
    ({"answers": ["r", "t"]}, "--target_loss=1e-9 --fit=False", ["does not do task", "train it further"]),
    ({"answers": ["ret", "t"]}, "", ["'ret'", "3 tokens"]),
    ({"answers": ["r", "Z"]}, "", ["train has 0 contexts", "'Z'"]),
    ({"answers": ["r", "t"], "contains": "nowhere"}, "", ["train has 0 contexts"]),
    ({"answers": ["r", "r"]}, "", ["is no task"]),
    ({"answers": "rt"}, "", ["is no task", "a list of two answers"]),
    ({"answers": ["r", "t"], "contians": "e"}, "", ["is no task", "'contians'"]),
    ({"answers": ["r", "t"], "target_los": 1}, "", ["is no task", "'target_los'"]),
    ({"answers": ["r", "t"], "prompts": []}, "", ["is no task", "'prompts'"]),
    ({"answers": ["r", ""]}, "", ["''", "0 tokens"]),
    ({"answers": ["r", "t"], "target_loss": "low"}, "", ["is no task"]),
    ({"answers": ["r", "t"], "beyond": ["nowhere"]}, "", ["no task 'nowhere'", "closest"]),
    ([["answers"]], "", ["is no task", "no JSON object"]),
    ({"prompts": [["a", "b"]], "held_out": []}, "", ["is no task"]),
    ({"prompts": [["a", "b", "b"]], "held_out": []}, "", ["two different answers"]),
    ({"prompts": [["a", "b", "c"]], "held_out": [["a", "b", "c"]]}, "", [
        "held_out has prompts that are among prompts: remove them"]),
    ({"prompts": [["a", "b", "c"]]}, "", ["is no task ('held_out' is missing)"]),
    ({"contains": "a"}, "", ["is no task ('answers' is missing)"]),
    ({"answers": ["r"]}, "", ["is no task (a list of two answers"]),
    ({"prompts": [[str(i), "b", "c"] for i in range(40)], "held_out": []}, "", ["0 prompts", "as often"]),
    ({}, "", ["is no task"]),
    ({"families": {"hard": [["a", "b", "c"]]}}, "", ["task is a list of hard inputs"]),
    ({"prompts": [["a", "b", "c"]], "held_out": []}, "", ["0 prompts", "write more"]),
    ({"prompts": [["a" * 40, "b", "c"], ["a" * 40, "c", "b"]] * 20, "held_out": []}, "",
     ["a prompt", "window of 16"]),
    ({"answers": ["r", "t"]}, "--ablation=median", ["mean or zero"]),
    ({"answers": ["r", "t"]}, "--penalties=some", ["penalties='some'"]),
    ({"answers": ["r", "t"]}, "--penalties=nan", ["penalties='nan'"]),
    ({"answers": ["r", "t"]}, "--penalties=1e-3,-1", ["of at least 0"]),
    ({"answers": ["r", "t"]}, "--unseen=nothing", ["no data in data/nothing"]),
    ({"answers": ["r", "t"]}, "--steps=0", ["steps=0"]),
    ({"answers": ["r", "t"]}, "--out_dir=nowhere", ["no checkpoint"]),
    ({"answers": ["r", "t"]}, "--task=qotes", ["no task 'qotes': the closest that exists is 'quotes'"]),
    ({"answers": ["r", "t"]}, "--task=x.json", ["no task {here}/x.json"]),
    ({"answers": ["r", "t"]}, "--task=my/own", ["no task {here}/my/own.json"]),
], ids=str)
def test_bad_input_to_circuit_is_one_line(task, capsys, spec, flags, words):
    """It says what is wrong, and nothing is written."""
    task(*spec) if isinstance(spec, list) else task(**spec)
    assert run(f"circuit.py --task=task.json {SMALL} {flags}") == 2
    error = capsys.readouterr().err.replace(os.getcwd(), "{here}")
    assert error.count("\n") == 1 and all(word in error for word in words), error
