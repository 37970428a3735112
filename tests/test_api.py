"""What Python calls: a model that is opened, read, frozen and looked into; a saved circuit; what can be
asked; two circuits compared; and all of it on released models. Each against plain hooks, weights or loops.
"""
import copy
import functools
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import circuits.loaded
import configurator
import released
import runs
from checkpoints import load_checkpoint
from circuits import Circuit, askable, compare, load, load_circuit, search
from circuits.controls import loss_of
from circuits.nodes import Contexts, hooks, means_over
from circuits.search import estimated_costs
from circuits.tasks import Source
from configurator import UserError, settings_of
from conftest import REPO, read, run
from experiments import attribution, evaluate
from model import GPT, GPTConfig
from test_circuit import SMALL, plain_run

WIDE = {"n_layer": 2, "d_model": 256, "d_head": 16, "d_mlp": 64, "block_size": 16, "vocab_size": 257,
        "use_positional_embeddings": True}  # as many channels as the quickstart, whose numbers README has
IDS = [256, 3, 1, 4, 1, 5]


def random_model(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**WIDE | changes)).eval()
    with torch.no_grad():
        for _, p, _ in model.sparse_parameters():
            p.mul_(4)
    model.prune_(1 / 4)
    return model


@pytest.fixture(scope="module")
def folder(prepared, interrupted, tmp_path_factory):
    """A folder with data/tiny, out/quickstart of a random model, and the circuit of a task in it."""
    path = shutil.copytree(prepared, tmp_path_factory.mktemp("api") / "here")
    os.makedirs(path / "out" / "quickstart")
    model, saved = random_model(), load_checkpoint(interrupted / "ckpt.pt")
    torch.save(saved | {"model": model.state_dict(), "config": vars(model.config)},
               path / "out" / "quickstart" / "ckpt.pt")
    shutil.copy(path / "data" / "tiny" / "tokenizer.json", path / "out" / "quickstart")
    for name in ("single_double_quote", "another"):
        with open(path / f"{name}.json", "w", encoding="utf-8") as f:
            json.dump({"answers": ["r", "t" if name == "another" else "e"], "target_loss": 5.0}, f)

    def take(removal, candidates, sizes):
        """Three edges at once, and no more."""
        if len(removal.path) == 1:
            removal.gates = removal.without([c for c in candidates if c >= removal.nodes.nodes][:3])
            removal.note(removal.loss(removal.gates, removal.contexts))
        return len(removal.path) == 2 and removal.path.append(removal.path[-1]) is None

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(search, "fewest", lambda loss_at, most, target: (40, {40: loss_at(40)}))
        patch.setattr(search.Removal, "take", take)
        for name in ("single_double_quote", "another"):
            assert run(f"circuit.py --out_dir=out/quickstart --task={name} --controls=False --page=False "
                       f"{SMALL}") == 0
    return path


@pytest.fixture
def quickstart(folder, monkeypatch):
    """That model, opened from that folder."""
    monkeypatch.chdir(folder)
    return load("out/quickstart", device="cpu")


@pytest.fixture
def library(monkeypatch):
    """No script runs, as in a notebook."""
    monkeypatch.setattr(configurator, "is_script", False)


@pytest.fixture
def saved(quickstart):
    return load_circuit(CIRCUIT, quickstart)


CIRCUIT = "out/quickstart/circuits/single_double_quote/circuit.json"


def script(monkeypatch, module, *arguments):
    """What a script prints, in this process, with the settings that a new one would start with."""
    for name, value in settings_of(vars(module)).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


# ----------------------------------------------------------------------------------------------------------
# a model


def test_reading_gives_the_models_logits_and_all_its_nodes(quickstart):
    """As plain hooks see them, of ids and of a text, with <|endoftext|> before it."""
    seen = {}
    plain = plain_run(quickstart.model, torch.tensor([IDS]), lambda name, x: seen.update({name: x[0]}))[0]
    logits, nodes = quickstart.read(IDS)
    assert torch.equal(logits, plain) and nodes.keys() == seen.keys() and not logits.requires_grad
    assert all(torch.equal(nodes[site], x) for site, x in seen.items())
    assert torch.equal(quickstart.read("ab")[0], quickstart.read([256, 97, 98])[0])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert quickstart.read(IDS)[0].dtype == torch.float32
    for ids in (range(6), np.arange(6), np.arange(6)[None], torch.arange(6, dtype=torch.int32)):
        assert torch.equal(quickstart.read(ids)[0], quickstart.read([0, 1, 2, 3, 4, 5])[0])


def test_attention_is_that_of_the_nodes(quickstart):
    """What the model reads of the values with it is what its projection reads; frozen keys change it."""
    seen, attn = [], quickstart.model.transformer.h[1].attn
    with hooks([(attn.c_proj, lambda x: seen.append(x[0]))], before=True):
        _, nodes = quickstart.read(IDS)
    attention = quickstart.attention(nodes, block=1)
    T = len(IDS)
    assert attention.shape == (attn.n_head, T, T) and not attention.triu(1).any()
    values = nodes["1.attn.attn_v"].view(T, attn.n_head, attn.d_head).transpose(0, 1)
    torch.testing.assert_close((attention @ values).transpose(0, 1).reshape(T, -1), seen[0])
    with quickstart.frozen({"0.attn.attn_k": list(range(attn.d_head))}, at=3.0):
        frozen = quickstart.attention(quickstart.read(IDS)[1])
    changed = (frozen != quickstart.attention(nodes)).flatten(1).any(1)
    assert changed.tolist() == [True] + [False] * (attn.n_head - 1)


def test_tokens_are_spelled(quickstart):
    """A text goes to ids and back; an id has its text, and a text of one token its id."""
    assert quickstart.decode(quickstart.encode("é = 1")[1:]) == "é = 1" and quickstart.decode([]) == ""
    assert quickstart.decode(97) == quickstart.decode(torch.tensor(97)) == "a"
    assert quickstart.token("a") == 97
    with pytest.raises(ValueError, match=r"'ab' is 2 tokens .*\['a', 'b'\]"):
        quickstart.token("ab")


@pytest.mark.parametrize("at", ["mean", "reversed", 0, 2.5, torch.tensor([1.0, -1.0]), torch.ones(6, 2)],
                         ids=str)
def test_frozen_nodes_are_what_was_said(quickstart, at):
    """As plain hooks make them; all others are computed from these; afterwards nothing is left of it."""
    site, channels = "1.attn.attn_v", [7, 40]
    mean = quickstart.nodes().means[site][channels]

    def change(name, x):
        if name == site:
            value = mean if at == "mean" else 2 * mean - x[..., channels] if at == "reversed" else at
            x[..., channels] = torch.as_tensor(value, dtype=x.dtype)
        return x

    expected = plain_run(quickstart.model, torch.tensor([IDS]), lambda name, x: change(name, x.clone()))[0]
    before = quickstart.read(IDS)[0]
    with quickstart.frozen({site: channels}, at):
        assert torch.equal(quickstart.read(IDS)[0], expected)
    assert torch.equal(quickstart.read(IDS)[0], before) and not torch.equal(before, expected)


@pytest.mark.parametrize("at", ["mean", 0])
def test_a_frozen_edge_is_a_weight_that_reads_the_mean(quickstart, at):
    """As if its weight were zero, and weight times mean (or zero) were part of the bias."""
    attn = quickstart.model.transformer.h[1].attn
    row, column = (attn.c_attn.weight[256:512] != 0).nonzero()[5].tolist()  # of the keys
    edge = ("1.attn.attn_in", column, "1.attn.attn_k", row)
    with quickstart.frozen(edges=[edge], at=at):
        frozen = quickstart.read(IDS)[0]
    weight = attn.c_attn.weight[256 + row, column].item()
    attn.c_attn.weight[256 + row, column] = 0
    mean = quickstart.means["1.attn.attn_in"][column].item()
    attn.c_attn.bias[256 + row] += weight * mean * (at == "mean")
    torch.testing.assert_close(quickstart.read(IDS)[0], frozen)


def test_a_channel_and_an_edge_are_taken_as_they_come(quickstart):
    """An int is one channel, also an array's; an edge may have its weight with it."""
    site = "0.attn.attn_v"
    for one in (7, np.int64(7), torch.tensor(7), torch.tensor([7]), range(7, 8)):
        with quickstart.frozen({site: [7]}, at=2.0):
            expected = quickstart.read(IDS)[0]
        with quickstart.frozen({site: one}, at=2.0):
            assert torch.equal(quickstart.read(IDS)[0], expected)
    row, column = quickstart.model.transformer.h[0].mlp.c_fc.weight.nonzero()[0].tolist()
    edge = ("0.mlp.mlp_in", column, "0.mlp.mlp_neuron", row)
    with quickstart.frozen(edges=[edge]):
        expected = quickstart.read(IDS)[0]
    with quickstart.frozen(edges=[(*edge, 0.5)]):
        assert torch.equal(quickstart.read(IDS)[0], expected)


def test_gradients_flow_through_frozen_nodes(quickstart):
    """To the value that a node is frozen at, as differences say; to all nodes before and after it."""
    quickstart.model.double()
    value = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def logit(value, gradients=False):
        with quickstart.frozen({"0.attn.attn_v": [3, 9]}, at=value):
            logits, nodes = quickstart.read(IDS, gradients)
        return logits[-1, 7], nodes

    [gradient] = torch.autograd.grad(logit(value)[0], value)
    step = 1e-6 * torch.eye(2, dtype=torch.float64)
    differences = [(logit(value.detach() + e)[0] - logit(value.detach() - e)[0]) / 2e-6 for e in step]
    torch.testing.assert_close(gradient, torch.stack(differences), rtol=1e-4, atol=1e-9)
    of, nodes = logit(value.detach(), gradients=True)
    found = dict(zip(nodes, torch.autograd.grad(of, list(nodes.values())), strict=True))
    assert all(g.abs().sum() > 0 for g in found.values())
    torch.testing.assert_close(found["0.attn.attn_v"].sum(0)[[3, 9]], gradient)


def test_attribution_is_gradient_times_difference(quickstart):
    """Of a loss it is what the search estimates of its gates; `attribution` is that of two logits."""
    nodes, contexts = quickstart.nodes(), Source(quickstart, 32, 32, 32).of_text(
        quickstart.data.val, "val", {"pair": [114, 101], "contains": ""}, 32)[:1]
    estimated = estimated_costs(nodes, contexts, torch.ones(nodes.number), fit=False)
    logits, values = quickstart.read(contexts.idx[0], gradients=True)
    loss = loss_of(logits[-1, contexts.answers])[0]
    gradients = torch.autograd.grad(loss, list(values.values()))
    found = [(g * (quickstart.means[site] - x)).sum(0)
             for (site, x), g in zip(values.items(), gradients, strict=True)]
    torch.testing.assert_close(torch.cat(found), estimated, rtol=1e-3, atol=1e-6)
    right, other = contexts.answers[0].tolist()
    slope = -torch.sigmoid(logits[-1, other] - logits[-1, right])  # of the loss by the difference of logits
    with torch.no_grad():
        effects = quickstart.attribution(contexts.idx[0], right, other)
    assert effects.keys() == values.keys()
    torch.testing.assert_close(-slope * torch.cat(list(effects.values())), torch.cat(found),
                               rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("quantile", [1.0, 0.0, 0.5])
def test_top_contexts_are_where_a_node_is_largest(quickstart, quantile):
    """Or lowest, or at its median: with the values and tokens that the model has there, and what follows."""
    site, channel = "1.mlp.mlp_in", 11
    places = quickstart.top_contexts(site, channel, n=4, quantile=quantile, windows=50)
    starts, idx = quickstart.evenly_spaced("val", 50)
    values = torch.stack([quickstart.read(row)[1][site][:, channel] for row in idx])
    some = values[values != 0].sort().values
    if quantile == 0.5:
        ranks = [(some - place.value).abs().argmin().item() for place in places]
        assert all(abs(rank - len(some) / 2) < 0.1 * len(some) for rank in ranks)
    else:
        assert places[0].value == pytest.approx(some[-1 if quantile else 0].item(), rel=1e-5)
    assert len({place.position for place in places}) == 4
    text = quickstart.tokenizer.decode(quickstart.data.val[:].tolist())
    for place in places:
        row = int(np.flatnonzero((starts <= place.position) & (place.position < starts + 16))[0])
        column = place.position - starts[row]
        assert place.values == pytest.approx(values[row, :column + 1].tolist(), rel=1e-4, abs=1e-6)
        assert place.value == place.values[-1] and len(place.tokens) == column + 1
        assert "⏎" in place.next or place.next.strip("␣×0123456789⏎⇥") in text
        assert f"[{place.tokens[-1]}] -> {place.next}" in str(place)


@pytest.mark.parametrize("norm", [True, False])
def test_direct_effects_are_the_logits_without_the_path(quickstart, norm):
    """At the last token, at the scale the last norm has there; values, neurons and outputs agree."""
    quickstart.model = random_model(d_model=32, d_head=8, d_mlp=24, use_rms_norm=norm).requires_grad_(False)
    model, x = quickstart.model, quickstart.model.residual_stream(torch.tensor([IDS]))[0, -1]
    nodes = quickstart.read(IDS)[1]
    for site in ("0.attn.attn_out", "1.mlp.mlp_out"):
        channel = int(nodes[site][-1].abs().argmax())
        less = x.clone()
        less[channel] -= nodes[site][-1, channel]
        if norm:
            scaled = [y / x.square().mean().sqrt() for y in (x, less)]
        else:
            scaled = [(y - y.mean()) / x.var(correction=0).sqrt() for y in (x, less)]
        expected = F.linear((scaled[0] - scaled[1]) * model.transformer.ln_f.weight, model.lm_head.weight)
        found = quickstart.direct_effect(site, channel, IDS)
        sizes = [effect for _, effect in found]
        assert sizes == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)
        assert found[0][0] == quickstart.tokenizer.decode([int(expected.argmax())])
    for part, writer in (("attn_v", "attn_out"), ("mlp_neuron", "mlp_out")):
        linear = getattr(model.transformer.h[1], part.split("_")[0]).c_proj
        linear.bias.zero_()  # of which no node is the cause
        total = [sum(dict(quickstart.direct_effect(f"1.{site.split('_')[0]}.{site}", c, IDS))["a"]
                     for c in range(width)) for site, width in ((part, linear.in_features), (writer, 32))]
        assert total[0] == pytest.approx(total[1], rel=1e-3, abs=1e-5)
    with pytest.raises(ValueError, match="does not write to the stream"):
        quickstart.direct_effect("0.attn.attn_k", 3)


def test_the_effect_of_one_unit_is_at_the_scale_of_train(quickstart):
    """Of an average token: that of a value of one divided by the mean root mean square of the stream."""
    model, (_, idx) = quickstart.model, quickstart.evenly_spaced("train", 64)
    rms = model.residual_stream(idx).square().mean(-1).sqrt().mean()
    expected = model.lm_head.weight[97, 4] * model.transformer.ln_f.weight[4] / rms
    found = dict(quickstart.direct_effect("1.mlp.mlp_out", 4))
    assert found["a"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("ask", [
    lambda r: r.top_contexts("0.attn.attn_z", 1), lambda r: r.top_contexts("0.attn.attn_v", 256),
    lambda r: r.frozen({"2.attn.attn_v": [1]}).__enter__(),
    lambda r: r.frozen({"0.attn.attn_v": [1]}, at="median").__enter__(),
    lambda r: r.frozen(edges=[("0.attn.attn_in", 1, "1.attn.attn_k", 1)]).__enter__(),
    lambda r: r.frozen(edges=[("0.attn.attn_in", 1, "0.attn.attn_k", 1)], at="reversed").__enter__(),
    lambda r: r.frozen(edges=[("0.attn.attn_in", 1, "0.attn.attn_k", 1)], at=torch.ones(2)).__enter__(),
    lambda r: r.frozen(edges=("0.attn.attn_in", 1, "0.attn.attn_k", 1)).__enter__(),
    lambda r: r.frozen({"0.attn.attn_v": "1"}).__enter__(), lambda r: r.frozen("0.attn.attn_v").__enter__(),
    lambda r: r.frozen({"0.attn.attn_v": [1.5]}).__enter__(),
    lambda r: r.frozen({"0.attn.attn_v": [1, 2]}, at=torch.ones(3)).__enter__(),
    lambda r: r.frozen({"0.attn.attn_v": [1, 2]}, at=torch.ones(1, 6, 2)).__enter__(),
    lambda r: r.frozen({"0.attn.attn_v": [1]}, at=None).__enter__(),
    lambda r: r.top_contexts("0.attn.attn_v", 1, split="test"),
    lambda r: r.read([]), lambda r: r.read([3, 257]), lambda r: r.read([-1]), lambda r: r.read([0.5, 1]),
    lambda r: r.read([[1, 2], [3, 4]]), lambda r: r.read(range(17)), lambda r: r.read(torch.tensor([])),
    lambda r: r.decode([257]), lambda r: r.decode([-1]), lambda r: r.token(""),
    lambda r: r.attribution(IDS, 1, 257), lambda r: r.direct_effect("0.attn.attn_out", 4, []),
])
def test_what_a_model_does_not_have_is_a_value_error(quickstart, ask):
    """One sentence, that names what there is."""
    with pytest.raises(ValueError) as error:
        ask(quickstart)
    assert "\n" not in str(error.value) and len(str(error.value)) > 30


def test_a_value_for_other_tokens_than_are_read_is_a_value_error(quickstart):
    """Which is known when they are read; afterwards nothing is frozen."""
    before = quickstart.read(IDS)[0]
    with quickstart.frozen({"0.attn.attn_v": [1, 2]}, at=torch.ones(5, 2)), \
            pytest.raises(ValueError, match="at is for 5 tokens, and 6 are read"):
        quickstart.read(IDS)
    assert torch.equal(quickstart.read(IDS)[0], before)


def test_means_are_computed_once_and_kept_beside_the_checkpoint(quickstart, monkeypatch):
    """By its sha256. Weights that were changed, a broken file and one that cannot be written do no harm."""
    nodes = quickstart.nodes(windows=40)
    path = Path(f"out/quickstart/means-{quickstart.sha256[:16]}-40.npz")
    kept, calls, compute = path.read_bytes(), [], circuits.loaded.means_over
    monkeypatch.setattr(circuits.loaded, "means_over", lambda *a: calls.append(1) or compute(*a))
    again = load("out/quickstart").nodes(windows=40)
    assert not calls and all(torch.equal(again.means[site], x) for site, x in nodes.means.items())
    assert all(torch.equal(again.mean_reads[site], x) for site, x in nodes.mean_reads.items())
    changed = load("out/quickstart")
    changed.model.transformer.wte.weight[:] = 0.1
    assert not torch.equal(changed.nodes(windows=40).means["0.attn.attn_in"], nodes.means["0.attn.attn_in"])
    assert calls == [1] and path.read_bytes() == kept
    path.write_bytes(kept[:1000])
    for times in (2, 2):  # made anew, and kept again
        load("out/quickstart").nodes(windows=40)
        assert len(calls) == times
    path.unlink()
    path.mkdir()  # where no file can be put
    again = load("out/quickstart").nodes(windows=40)
    assert torch.equal(again.means["1.mlp.mlp_in"], nodes.means["1.mlp.mlp_in"])
    assert len(calls) == 3 and not os.listdir(path)
    path.rmdir()


def test_means_are_those_of_the_model_whatever_hooks_it_has(quickstart):
    """Also while nodes are frozen, so that what is kept beside the checkpoint is right; the hooks act on."""
    nodes = {"0.attn.attn_v": list(range(64))}
    path = Path(f"out/quickstart/means-{quickstart.sha256[:16]}-41.npz")
    expected = means_over(quickstart.model, quickstart.evenly_spaced("train", 41)[1])
    before = quickstart.read(IDS)[0]
    with quickstart.frozen(nodes, at=5.0):
        frozen = quickstart.read(IDS)[0]
        found = quickstart.nodes(windows=41)
        assert torch.equal(quickstart.read(IDS)[0], frozen) and not torch.equal(frozen, before)
    again = load("out/quickstart").nodes(windows=41)
    for one in (found, again):
        assert all(torch.equal(one.means[site], x) for site, x in expected[0].items())
        assert all(torch.equal(one.mean_reads[site], x) for site, x in expected[1].items())
    path.unlink()


def test_a_model_is_opened_from_any_folder(folder, tmp_path, monkeypatch, library, capsys):
    """By the path of its out_dir or its checkpoint; its data is in data/ here or of the repository."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load(folder / "out" / "quickstart")
    assert f"no data in {os.path.join('data', 'tiny')}, nor in {REPO}" in str(error.value)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(runs, "__file__", str(folder / "runs.py"))
    for path in (folder / "out" / "quickstart", str(folder / "out" / "quickstart" / "ckpt.pt")):
        assert repr(load(path)).endswith("ckpt.pt: 2 blocks, d_model 256, on tiny>")
    assert load_circuit(folder / CIRCUIT).run.path.endswith("ckpt.pt")


def test_an_error_of_a_script_ends_it_with_its_line(tmp_path, capsys):
    """And with status 2."""
    with pytest.raises(UserError, match="no checkpoint at .*: check --out_dir") as error:
        load(tmp_path)
    assert isinstance(error.value, SystemExit) and error.value.code == 2
    assert capsys.readouterr().err == f"error: {error.value}\n"


def test_an_error_elsewhere_is_an_exception_with_the_sentence(tmp_path, library, capsys):
    """It says what `load` takes, and nothing is printed."""
    for name in ("", "nowhere"):
        with pytest.raises(UserError) as error:
            load(tmp_path / name)
        assert str(error.value) == (f"no checkpoint at {tmp_path / name / 'ckpt.pt'}: give the folder of a "
                                    "run, a checkpoint, or a released model's folder")
    with pytest.raises(UserError, match="No such file"):
        load_circuit(tmp_path / "circuit.json")
    assert capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------------
# a circuit


def test_a_saved_circuit_has_the_losses_that_it_was_saved_with(saved):
    """Raw and fitted, on the contexts that it was judged by; its nodes and edges are those of the file."""
    results = saved.record["results"]
    for fitted, key in ((False, "circuit"), (True, "circuit_fitted")):
        found = saved.result(fitted=fitted)
        assert found == pytest.approx({name: results[key][name] for name in found}, rel=1e-5)
    assert saved.kept == saved.record["nodes"]
    assert f"{results['circuit']['nodes']} nodes, {results['circuit']['edges']} edges" in repr(saved)
    assert [list(edge[:4]) for edge in saved.edges] == saved.record["edges"]


def test_a_circuit_loses_a_node_an_edge_or_all(saved):
    """As gates say; a circuit without all its nodes is the model with all ablated, and what is no part of it
    is refused."""
    nodes, contexts = saved.nodes, saved.contexts()
    site, [channel, *_] = next(iter(saved.kept.items()))
    gates = saved.gates.clone()
    nodes.split(gates)[site][channel] = 0
    assert torch.equal(saved.minus(site, channel).gates, gates)
    assert channel not in saved.minus(site, channel).kept.get(site, [])
    edge = saved.edges[0][:4]
    less = saved.minus_edge(*edge)
    assert torch.equal(saved.minus_edge(*saved.edges[0]).gates, less.gates)  # with its weight
    assert [e for e in saved.edges if e not in less.edges] == [saved.edges[0]]
    assert torch.equal(nodes.judge(contexts, saved.without().gates),
                       nodes.with_edges(()).judge(contexts, 1 - saved.gates[:nodes.nodes]))
    none = saved
    for at, channels in saved.kept.items():
        for c in channels:
            none = none.minus(at, c)
    assert none.kept == {} and none.edges == []
    ablated = {at: torch.tensor(x) for at, x in saved.record["means"].items()}
    logits = plain_run(saved.run.model, contexts.idx, lambda at, x: ablated[at].expand_as(x))[:, -1]
    expected = loss_of(logits.gather(1, contexts.answers)).mean().item()
    assert none.result()["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="is no node of the circuit"):
        none.minus(site, channel)
    with pytest.raises(ValueError, match="there is no edge from"):
        less.minus_edge(*edge)


def test_the_rest_of_the_model_loses_an_edge(saved):
    """One that is none of the circuit's."""
    rest, ids = saved.without(), IDS
    edges = rest.edges
    edge = next(edge for edge in edges if edge[2].endswith("attn_q"))
    less = rest.minus_edge(*edge)
    assert set(edges) - set(less.edges) == {edge} and edge not in saved.edges
    nodes = saved.nodes.with_edges([edge[:4]])
    gates = torch.cat([1 - saved.gates[:nodes.nodes], torch.zeros(1)])
    expected = Circuit(saved.run, saved.record, nodes, gates).logits(ids)
    assert not torch.equal(rest.logits(ids), less.logits(ids))
    torch.testing.assert_close(less.logits(ids), expected)


def test_a_circuit_reads_any_text(saved):
    """Its logits are those at the last token; its choice is of the two answers alone, fitted or not."""
    contexts = saved.contexts()
    one = contexts.idx[3]
    torch.testing.assert_close(saved.logits(one), saved.nodes.next_logits(contexts[3:4], saved.gates)[0])
    assert saved.logits("if x").shape == (257,)
    for circuit, fitted in ((saved, False), (saved, True), (saved.without(), False)):
        choice = circuit.choice(one, fitted)
        assert sum(choice.values()) == pytest.approx(1) and set(choice) == set("re")
        z = circuit.logits(one)[101] - circuit.logits(one)[114]
        z = saved.record["scale"] * z + saved.record["shift"] if fitted else z
        assert choice["e"] == pytest.approx(torch.sigmoid(z).item(), rel=1e-4)
    assert saved.choice(one) == saved.choice(one, fitted=False) != saved.choice(one, fitted=True)
    for ask in (lambda: saved.without().choice(one, fitted=True), lambda: saved.logits([]),
                lambda: saved.without().result(fitted=True)):
        with pytest.raises(ValueError, match="not of the rest of the model|there are no token ids"):
            ask()


def test_nodes_are_read_inside_the_circuit(saved):
    """Ablated ones at their means, kept ones as other ablated ones leave them; freezing reaches them."""
    one = saved.contexts().idx[3]
    logits, nodes = saved.read(one)
    assert torch.equal(logits, saved.logits(one)) and nodes.keys() == saved.nodes.sites.keys()
    for site, x in nodes.items():
        off = [c for c in range(x.size(1)) if c not in saved.kept.get(site, ())]
        mean = torch.tensor(saved.record["means"][site])
        assert torch.equal(x[:, off], mean[off].expand(len(x), -1))
        late = site.startswith(f"{saved.run.model.config.n_layer - 1}.") and not site.endswith(
            ("attn_in", "attn_q", "attn_k", "attn_v"))
        assert len(x) == (1 if late else len(one))
    site, [channel, *_] = next(iter(saved.kept.items()))
    with saved.run.frozen({site: channel}, at=2.5):
        assert (saved.read(one)[1][site][:, channel] == 2.5).all()


def test_a_circuit_is_not_judged_by_other_data_than_its_own(saved):
    """What comes next there is then not the answer, or there is no such place."""
    other, val = copy.copy(saved.run.data), saved.run.data.val.copy()
    positions = saved.record["contexts"]["positions"]
    for other.val in (np.roll(val, 1), val[:max(map(max, positions))]):
        with pytest.raises(ValueError, match="not in this data: it was found on"):
            replace(saved, run=replace(saved.run, data=other)).result()
    assert replace(saved, run=replace(saved.run, data=saved.run.data)).result() == saved.result()


def test_a_circuit_of_another_model_or_none_is_refused(quickstart, tmp_path):
    """In one sentence."""
    record = json.loads(read(CIRCUIT))
    for name, change in (("other", {"sha256": "0" * 64}), ("old", {"format": 1})):
        (tmp_path / name).write_text(json.dumps(record | change))
    with pytest.raises(UserError, match="of another checkpoint"):
        load_circuit(tmp_path / "other", quickstart)
    for path, reason in ((tmp_path / "old", "its format is 1, not 2"), (tmp_path, "Is a directory"),
                         (tmp_path / "none", "No such file or directory"),
                         ("single_double_quote.json", "it lacks 'format'")):
        with pytest.raises(UserError) as error:
            load_circuit(path, quickstart)
        assert str(error.value) == (f"cannot use circuit={str(path)!r} ({reason}): give a circuit.json of "
                                    "circuit.py")


def test_the_block_of_the_readme_runs(folder, monkeypatch, capsys):
    """As it stands there, in a folder with a model in out/quickstart."""
    monkeypatch.chdir(folder)
    [block] = [block for block in read(os.path.join(REPO, "README.md")).split("```")
               if block.startswith("python\n") and "from circuits import" in block]
    names = {}
    exec(block.removeprefix("python\n"), names)  # noqa: S102  our own text
    assert names["logits"].shape[1] == 257 and names["attention"].shape == (16, *[len(names["ids"])] * 2)
    assert " -> " in capsys.readouterr().out
    assert names["estimates"].keys() == names["nodes"].keys()


# ----------------------------------------------------------------------------------------------------------
# what can be asked


def test_candidates_come_after_the_same_tokens_about_as_often():
    """Counted as a loop counts; a pair that shares nothing, or of which one is rare, is none."""
    rng = np.random.default_rng(0)
    tokens = rng.choice(6, size=3000, p=[0.3, 0.3, 0.2, 0.1, 0.08, 0.02]).astype(np.uint16)
    ids, counts = askable.counts_of(tokens, 8)
    assert set(ids[:6]) == set(range(6))
    for column, token in enumerate(ids):
        for before in range(8):
            pairs = zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
            assert counts[before, column] == sum(pair == (before, token) for pair in pairs)
    made = np.zeros((4, 4), dtype=int)
    made[:2, 0] = made[:2, 1] = 50  # alike
    made[2:, 2] = 100  # after other tokens
    made[:2, 3] = 5  # as the first, but rare
    assert askable.pairs_of(made).tolist() == [[0, 1]]


def test_the_pool_estimates_what_a_loop_computes(quickstart, monkeypatch):
    """The model's loss, and the better of the last token and the bigram table, each answer half."""
    monkeypatch.setattr(askable, "POOL", 40)
    ids, counts = askable.counts_of(quickstart.data.train, 257)
    logits, table, before, follows = askable.pool_of(quickstart, ids)
    pair = np.array([[0, 1]])
    [found] = askable.estimates(pair, logits, table, counts, before, follows)
    _, idx = quickstart.evenly_spaced("train", 40)
    losses = {kind: {0: [], 1: []} for kind in ("model", "table", "last")}
    for row in idx:
        whole, _ = quickstart.read(row)
        for t in range(8, 15):
            if row[t + 1] in ids[:2]:
                this = int(row[t + 1] == ids[1])
                shares = counts[row[t], :2] / counts[:, :2].sum(0) + 1e-5
                for kind, of in (("model", whole[t, ids[:2]]), ("last", torch.tensor(shares).log()),
                                 ("table", quickstart.model.bigram_table[row[t], ids[:2]])):
                    losses[kind][this].append(F.softplus(of[1 - this] - of[this]).item())
    model, table, last = ((np.mean(of[0]) + np.mean(of[1])) / 2 for of in
                          (losses[kind] for kind in ("model", "table", "last")))
    assert found == pytest.approx([model, min(table, last)], rel=1e-4)


def test_what_a_model_can_be_asked_is_listed(quickstart, monkeypatch, capsys):
    """Pairs, with losses and examples, as a task file says them; tasks, each with a verdict, none an end."""
    monkeypatch.setattr(askable, "POOL", 40)
    monkeypatch.setattr(askable, "told_apart", lambda loaded: iter([[101, 114], [101, 32], [256, 101]]))
    monkeypatch.setattr(askable, "measured", lambda loaded, nodes, spec: (
        dict.fromkeys(dict(askable.COLUMNS), 0.2 if 114 in spec["pair"] else 0.6) | {
            "last token": 0.6, "bigram table": 0.6, "contexts": 40},
        Source(loaded, 32, 32, 32).of_text(loaded.data.val, "val", spec, 40)))
    script(monkeypatch, askable, "--out_dir=out/quickstart")
    printed = capsys.readouterr().out
    assert "e | r" in printed and '{"answers": ["e", "r"]}' in printed
    assert printed.count('"answers"') == 1  # a loss of 0.6 is not listed, nor what no file can say
    [shown] = re.findall(r"^    (.*)\[r\]$", printed, re.MULTILINE)
    assert len(shown) >= 8 and f"{shown}r" in read("0.txt") + "".join(read(f"{i}.txt") for i in range(12))


def test_tasks_are_judged_one_by_one(quickstart, monkeypatch, capsys):
    """By the loss on train that circuit.py would find; what is no task says why, and the next follows."""
    with open("hard.json", "w", encoding="utf-8") as f:
        json.dump({"answers": ["r", "e"], "target_loss": 1e-3}, f)
    with pytest.raises(UserError) as error:
        script(monkeypatch, askable, "--out_dir=out/quickstart", "--task=x.json,single_double_quote,hard")
    assert error.value.code == 2 and str(error.value).startswith("1 of 3 tasks cannot be asked")
    *_, nothing, able, hard = capsys.readouterr().out.splitlines()
    assert f"cannot be asked: no task {os.getcwd()}/x.json" in nothing and "yes, at its target of 5" in able
    script(monkeypatch, askable, "--out_dir=out/quickstart", "--task=single_double_quote")  # ends well
    found = re.search(r"no: ([\d.]+) on train, above its target of 0.001", hard)
    assert run(f"circuit.py --out_dir=out/quickstart --task=hard {SMALL}".replace(
        "choosing_contexts=32", "choosing_contexts=512")) == 2
    refusal = capsys.readouterr().err
    assert f"its loss is {found[1]}" in refusal and "python -m circuits.askable" in refusal


# ----------------------------------------------------------------------------------------------------------
# two circuits


def test_correlations_are_numpys():
    """Summed over batches; a column that does not vary correlates with nothing."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 3)), rng.normal(size=(90, 4))
    y[:, 0], y[:, 1] = -2 * x[:, 1] + 5, 7
    found = compare.Correlation()
    for rows in np.array_split(np.arange(90), 4):
        found.add(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
    expected = np.array([[0 if b == 1 else np.corrcoef(x[:, a], y[:, b])[0, 1] for b in range(4)]
                         for a in range(3)])
    np.testing.assert_allclose(found.matrix().numpy(), expected, atol=1e-10)


def test_a_model_with_its_neurons_and_heads_exchanged_matches_itself(saved, monkeypatch):
    """Neurons and heads in another order: each node and head is found, with correlation 1; with other
    windows it is not."""
    twin = copy.deepcopy(saved.run.model)
    block = twin.transformer.h[1]
    order, heads = torch.randperm(64), torch.randperm(16)
    block.mlp.c_fc.weight.copy_(block.mlp.c_fc.weight[order])
    block.mlp.c_fc.bias.copy_(block.mlp.c_fc.bias[order])
    block.mlp.c_proj.weight.copy_(block.mlp.c_proj.weight[:, order])
    channels = (heads[:, None] * 16 + torch.arange(16)).flatten()
    rows = torch.cat([part * 256 + channels for part in range(3)])
    block.attn.c_attn.weight.copy_(block.attn.c_attn.weight[rows])
    block.attn.c_attn.bias.copy_(block.attn.c_attn.bias[rows])
    block.attn.c_proj.weight.copy_(block.attn.c_proj.weight[:, channels])
    block.attn.sink_logit.copy_(block.attn.sink_logit[heads])
    other = copy.copy(saved.run)
    other.model = twin
    gates = torch.zeros(saved.nodes.nodes)
    nodes = saved.nodes.with_edges(())
    for site, c in (("1.mlp.mlp_neuron", 5), ("1.attn.attn_k", 37), ("0.attn.attn_in", 8)):
        nodes.split(gates)[site][c] = 1
    first = Circuit(saved.run, saved.record, nodes, gates)
    second = Circuit(other, saved.record, nodes, torch.zeros(nodes.nodes))
    monkeypatch.setattr(compare, "windows", 64)
    found = {(row["site"], row["channel"]): row for row in compare.matches(first, second)}
    where = {int(c): i for i, c in enumerate(channels)}
    expected = {("1.mlp.mlp_neuron", 5): ("1.mlp.mlp_neuron", order.tolist().index(5)),
                ("1.attn.attn_k", 37): ("1.attn.attn_k", where[37]),
                ("0.attn.attn_in", 8): ("0.attn.attn_in", 8),
                ("1.head", 2): ("1.head", heads.tolist().index(2))}
    assert {key: row["match"] for key, row in found.items()} == expected
    assert all(row["r"] == pytest.approx(1, abs=1e-4) and not row["in_circuit"] for row in found.values())
    assert all(row["exchanged"] < 0.8 for key, row in found.items() if "head" not in key[0])


def test_padding_is_no_part_of_what_is_alike(saved, monkeypatch):
    """Of contexts of different lengths, nodes and heads are compared at their own tokens alone."""
    contexts = Contexts.of([(IDS, [1, 2]), (IDS[:3], [1, 2]), (IDS[1:5], [1, 2])])
    monkeypatch.setattr(compare, "text", "task")
    monkeypatch.setattr(Circuit, "contexts", lambda _: contexts)
    asked = {"0.head": [1], "0.mlp.mlp_neuron": [5]}
    found = compare.correlations(saved, saved, asked)
    parts = [compare.read(saved.run, contexts.idx[[row], :last + 1])
             for row, last in enumerate(contexts.last.tolist())]
    for site, [column] in asked.items():
        whole = torch.cat([part[site][0] for part in parts]).double().numpy()
        r = [np.corrcoef(whole[:, column], other)[0, 1] if other.std() > 1e-8 else 0 for other in whole.T]
        names, matrix, _ = found[site]
        at = [i for i, (other, _) in enumerate(names) if other == site]
        np.testing.assert_allclose(matrix[0, at].numpy(), r, atol=1e-5)


def test_two_circuits_of_one_model_share_what_both_have(saved, monkeypatch, capsys):
    """Counted by name, beside what random circuits as large would share."""
    other = load_circuit("out/quickstart/circuits/another/circuit.json", saved.run)
    found = compare.shared(saved, other)
    pairs = {(site, c) for site, channels in saved.kept.items() for c in channels}
    assert found["nodes"] == [f"{site} {c}" for site, channels in saved.kept.items() for c in channels
                              if c in other.kept.get(site, [])]
    script(monkeypatch, compare, CIRCUIT, CIRCUIT)
    n = len(pairs)
    assert f"nodes: {n} shared of {n} and {n}; by chance " in capsys.readouterr().out
    chance = sum(len(channels)**2 / int((saved.run.means[site] != 0).sum())
                 for site, channels in saved.kept.items())
    assert compare.shared_by_chance(saved, saved) == pytest.approx(chance, rel=0.1)
    with pytest.raises(UserError, match="name two circuits"):
        script(monkeypatch, compare, CIRCUIT)


# ----------------------------------------------------------------------------------------------------------
# attribution and masks


def test_attribution_and_masks_are_compared_in_a_table(quickstart, monkeypatch, capsys):
    """A row for each order, a loss for each size; the absolute costs are those of contexts one by one."""
    nodes = quickstart.nodes()
    contexts = Source(quickstart, 32, 32, 32).of_text(
        quickstart.data.val, "val", {"pair": [114, 101], "contains": ""}, 40)[:3]
    ones = torch.ones(nodes.number)
    expected = sum(estimated_costs(nodes, contexts[i:i + 1], ones, fit=False).abs() for i in range(3))
    torch.testing.assert_close(attribution.absolute_costs(nodes, contexts), expected, rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(attribution, "Source", functools.partial(Source, choosing=32, judging=40))
    script(monkeypatch, attribution, "--out_dir=out/quickstart", "--tasks=another", "--steps=2",
           "--sizes=4,32", "--penalties=1e-3", "--contexts=32", "--device=cpu")
    rows = re.findall(r"^\| ([a-z ]+) \| (\d\.\d+) \| (\d\.\d+) \|$", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == ["learned masks", "attribution", "absolute attribution", "random"]


# ----------------------------------------------------------------------------------------------------------
# released models


MODELS = {
    "two layers, positions, sinks": {}, "three layers, no positions": {
        "n_layer": 3, "use_positional_embeddings": False, "d_model": 32},
    "no sinks, tied": {"use_attention_sinks": False, "tie_embeddings": True, "d_model": 32},
    "LayerNorm, no bigram table, relu": {"use_rms_norm": False, "use_bigram_table": False, "d_model": 32,
                                         "activation": "relu", "residual_activation": "relu"},
}


@pytest.fixture
def exported(folder, monkeypatch):
    """exported(older=False, **changes) writes a random model as the released ones are, in `released`."""
    monkeypatch.chdir(folder)
    shutil.rmtree("released", ignore_errors=True)

    def write(older=False, **changes):
        model = random_model(**changes)
        model.tokenizer_name = "bytes"
        released.write(model, "released")
        if older:  # keys of the first generation
            config = json.loads(read("released/beeg_config.json"))
            config |= {"n_mlp": config.pop("d_mlp"), "bigram_table_rank": None}
            del config["d_pos_emb"], config["flash"]
            with open("released/beeg_config.json", "w", encoding="utf-8") as f:
                json.dump(config, f)
        return model

    return write


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_released_folder_is_asked_like_a_run(exported, changes):
    """Opened with data of its tokenizer, searched for a circuit, which is opened again by its path alone."""
    model = exported(older="n_layer" in changes, **changes)
    opened = load("released", dataset="tiny")
    assert torch.equal(opened.read(IDS)[0], model(torch.tensor([IDS]))[0][0]) and opened.step is None
    assert run(f"circuit.py --out_dir=released --dataset=tiny --task=another --controls=False {SMALL}") == 0
    assert sorted(os.listdir("released/circuits/another")) == ["circuit.html", "circuit.json", "circuit.png"]
    circuit = load_circuit("released/circuits/another/circuit.json")
    assert circuit.result()["loss"] == pytest.approx(circuit.record["results"]["circuit"]["loss"], rel=1e-4)


def test_a_released_folder_is_sampled_and_evaluated(exported, monkeypatch, capsys):
    """By the same commands as a run; evaluation needs the data's name."""
    exported()
    shutil.copy("data/tiny/tokenizer.json", "released")
    assert run("sample.py --out_dir=released --num_samples=1 --max_new_tokens=3 --device=cpu") == 0
    capsys.readouterr()
    script(monkeypatch, evaluate, "--out_dirs=released,out/quickstart", "--dataset=tiny", "--device=cpu")
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    column = rows[0].index("val_loss")
    assert rows[1][0] == "released" and rows[1][column] == rows[2][column]  # the same random model


def test_data_that_does_not_go_with_a_released_model_is_refused(exported, capsys):
    """No data named, or of another tokenizer, in one line each."""
    exported()
    for dataset, words in (("", "add --dataset=NAME"), ("other", "has another tokenizer")):
        assert run(f"circuit.py --out_dir=released --dataset={dataset} --task=another {SMALL}") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
    with pytest.raises(UserError, match="holds a released model"):
        load("released")


def test_the_digest_of_a_released_model_knows_its_configuration(exported):
    """The same weights that compute something else are another model, with circuits of its own."""
    exported()
    before = load("released", dataset="tiny").sha256
    config = json.loads(read("released/beeg_config.json"))
    with open("released/beeg_config.json", "w", encoding="utf-8") as f:
        json.dump(config | {"afrac": None}, f)
    assert load("released", dataset="tiny").sha256 != before


def test_importing_circuits_draws_nothing():
    """matplotlib is imported where a picture is drawn, and not before."""
    source = "import sys, circuits; sys.exit('matplotlib' in sys.modules)"
    assert os.spawnvpe(os.P_WAIT, sys.executable, [sys.executable, "-c", source],
                       os.environ | {"PYTHONPATH": REPO}) == 0
