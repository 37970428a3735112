"""The controls of a circuit: what a sceptic asks, as functions that circuit.py calls, and their table.

Results are dicts: loss and accuracy of the choice between two answers, nodes and edges. At the end, for
searches of their own: models and labels with what was learned destroyed.
"""
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from circuits.nodes import count
from circuits.search import apply_fit, fit, loss_of
from model import GPT

DRAWS = 5  # of random nodes
GIVEN_BACK = (0.1, 0.25, 0.5, 0.75)  # shares of the ablated nodes

# ----------------------------------------------------------------------------------------------------------
# results


def result(logits):
    """Loss, standard error (if contexts are independent), accuracy; of logits (n, 2), the right first."""
    losses, margin = loss_of(logits), logits[:, 0] - logits[:, 1]
    return {"loss": losses.mean().item(), "standard_error": (losses.std() / len(losses)**0.5).item(),
            "accuracy": (margin.sign() / 2 + 0.5).mean().item()}  # a tie is half right


def fitted(nodes, gates, choosing, judging):
    """The result when the logits are scaled, and one answer's shifted, to do best on train."""
    scale, shift = fit(nodes.judge(choosing, gates), choosing.sides())
    return result(apply_fit(nodes.judge(judging, gates), judging.sides(), scale, shift))


def last_token_alone(train, contexts):
    """Logits (n, 2) of how often train has each answer after the last token, as if both were as frequent."""
    before, after, shares = train[:-1], train[1:], {}
    for answer in contexts.answers.unique().tolist():
        count = np.bincount(before[after == answer], minlength=2**16)
        shares[answer] = count / max(count.sum(), 1)
    rows = zip(contexts.last_tokens()[:, 0].tolist(), contexts.answers.tolist(), strict=True)
    found = torch.tensor([[shares[answer][last] for answer in pair] for last, pair in rows])
    return (found + 1e-5).log()  # about one occurrence: what is not in train decides nothing


def random_like(nodes, gates, generator):
    """Gates of as many nodes at each site, drawn among those that are ever active."""
    drawn = torch.zeros_like(gates)
    drawn[nodes.nodes:] = 1  # no edge between them is removed
    for name, part in nodes.split(drawn).items():
        live = nodes.means[name].nonzero()[:, 0]
        shuffled = live[torch.randperm(len(live), generator=generator).to(live.device)]
        part[shuffled[:int(nodes.split(gates)[name].sum())]] = 1
    return drawn


def baselines(nodes, train, contexts, seed):
    """Results without a circuit: name -> dict. What bigrams solve is no task for one, and what is as easy in
    random order asks only which tokens there are."""
    model, ones = nodes.model, torch.ones(nodes.number, device=nodes.device)
    bigrams = torch.zeros(len(contexts), 1, model.config.vocab_size, device=nodes.device)
    bigrams = (bigrams + F.embedding(contexts.last_tokens(), model.bigram_table))[:, 0]
    return {
        "whole": result(nodes.judge(contexts, ones)) | count(nodes, ones),
        "random_order": result(nodes.judge(contexts.in_random_order(seed), ones)),
        "bigram_table": result(bigrams.gather(1, contexts.answers)),
        "last_token": result(last_token_alone(train, contexts)),
        "nothing": result(nodes.judge(contexts, 0 * ones)) | count(nodes, 0 * ones),
        "chance": result(torch.zeros(len(contexts), 2)),
    }


def random_draws(nodes, gates, contexts, seed):
    """Results of as many random nodes per site, as a circuit and when they are ablated: two lists."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [random_like(nodes, gates, generator) for _ in range(DRAWS)]
    return ([result(nodes.judge(contexts, g)) | count(nodes, g) for g in drawn],
            [result(nodes.judge(contexts, g)) | count(nodes, g) for g in map(nodes.others, drawn)])


def agreement(nodes, gates, contexts):
    """How often the whole model chooses the same answer, right or wrong; the correlation of how much the
    answer of the lower id is preferred, 0 if one of the two does not vary; how often either is right."""
    whole, inside = (contexts.sides() * (c[:, 0] - c[:, 1]) for c in
                     (nodes.judge(contexts, torch.ones_like(gates)), nodes.judge(contexts, gates)))
    right = contexts.sides() > 0
    return {"right": ((inside > 0) == right).float().mean().item(),
            "whole_right": ((whole > 0) == right).float().mean().item(),
            "same_answer": ((whole > 0) == (inside > 0)).float().mean().item(),
            "correlation": torch.corrcoef(torch.stack([whole, inside]))[0, 1].nan_to_num().item()}


def attention_kept(nodes, gates, contexts):
    """'block.head' of each head with a kept node -> the last token's attention to the token that it attends
    to most in the whole model, there and in the circuit, and how much of all its attention is the same."""
    found, heads = {}, nodes.kept_heads(gates)
    for block in sorted({block for block, _ in heads}):
        whole, inside = (nodes.attention(contexts, g, block) for g in (torch.ones_like(gates), gates))
        first = whole.argmax(2, keepdim=True)
        in_whole, in_circuit = (attention.gather(2, first).mean((0, 2)) for attention in (whole, inside))
        same = torch.minimum(whole, inside).sum(2).mean(0)
        found |= {f"{b}.{h}": {"whole": in_whole[h].item(), "circuit": in_circuit[h].item(),
                               "same": same[h].item()} for b, h in heads if b == block}
    return found


def faithfulness(nodes, gates, contexts, seed):
    """Whether the circuit errs where the whole model errs, and gets better as nodes are given back to it."""
    off = (gates[:nodes.nodes] == 0).nonzero()[:, 0]
    generator, losses = torch.Generator().manual_seed(seed), {share: [] for share in GIVEN_BACK}
    for _ in range(DRAWS):
        order = off[torch.randperm(len(off), generator=generator).to(off.device)]
        for share in GIVEN_BACK:
            more = gates.clone()
            more[order[:int(share * len(off))]] = 1
            losses[share].append(loss_of(nodes.judge(contexts, more)).mean().item())
    return agreement(nodes, gates, contexts) | {
        "attention": attention_kept(nodes, gates, contexts),
        "given_back": {str(share): values for share, values in losses.items()}}


def interventions(nodes, gates, contexts):
    """Results when kept nodes are removed or reversed: for each query, key, value and neuron, and for all
    queries, keys or values of a head together. A list of dicts.

    In the whole model and in the circuit, with the accuracy for either answer, that of the lower id first.
    For queries and keys also the mean attention of their head, in the whole model, to the token that it
    attends to most when nothing is done.
    """
    d_head, found = nodes.model.config.d_head, []
    for name, channels in nodes.kept(gates).items():
        block, location = int(name.split(".")[0]), name.split(".")[-1]
        if location not in ("attn_q", "attn_k", "attn_v", "mlp_neuron"):
            continue
        groups = [[channel] for channel in channels]
        if location != "mlp_neuron":
            heads = {c // d_head for c in channels}
            together = [[c for c in channels if c // d_head == head] for head in sorted(heads)]
            groups += [group for group in together if len(group) > 1]
        if location in ("attn_q", "attn_k"):
            untouched = nodes.attention(contexts, torch.ones_like(gates), block)
        for group in groups:
            record = {"site": name, "channels": group}
            for what, value in (("removed", 0.0), ("reversed", -1.0)):
                for where, before in (("whole", torch.ones_like(gates)), ("circuit", gates)):
                    after = before.clone()
                    nodes.split(after)[name][group] = value
                    logits = nodes.judge(contexts, after)
                    record[f"{what}_in_{where}"] = result(logits) | {"accuracy_of_each": [
                        result(logits[contexts.sides() == side])["accuracy"] for side in (1, -1)]}
                    if where == "whole" and location in ("attn_q", "attn_k"):
                        looks = [attention[:, group[0] // d_head] for attention in
                                 (untouched, nodes.attention(contexts, after, block))]
                        top = looks[0].argmax(1, keepdim=True)
                        record["attention"], record[f"attention_{what}"] = (
                            look.gather(1, top).mean().item() for look in looks)
            found.append(record)
    return found


# ----------------------------------------------------------------------------------------------------------
# what was learned, destroyed


def drawn_anew(model, seed):
    """The same model, its weights drawn anew and pruned to as many."""
    torch.manual_seed(seed)
    new = GPT(model.config).to(next(model.parameters()).device).eval().requires_grad_(False)
    matrices = model.decayed_parameters()
    l0 = sum(p.count_nonzero().item() for p in matrices) / sum(p.numel() for p in matrices)
    new.prune_(max(l0, new.smallest_l0()))
    return new


def shuffled_weights(model, seed):
    """The same model, the weights of each pruned matrix and bias shuffled within it."""
    new = GPT(model.config).to(next(model.parameters()).device).eval().requires_grad_(False)
    new.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for _, p, _ in new.sparse_parameters():
        p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p))
    return new


def shuffled_labels(contexts, seed):
    """The same contexts, the two answers of each exchanged or not by chance."""
    generator = torch.Generator().manual_seed(seed)
    exchange = (torch.rand(len(contexts), 1, generator=generator) < 0.5).to(contexts.answers.device)
    return replace(contexts, answers=torch.where(exchange, contexts.answers.flip(1), contexts.answers))


# ----------------------------------------------------------------------------------------------------------
# the table

CAVEATS = """The circuit chooses between two given answers. It is sufficient, and as necessary as the table
says, under this ablation and on these contexts. That does not prove that the model computes the task so:
norms and AbsTopK react to what is ablated, and causal scrubbing would ask for more."""
HEADINGS = {
    "chance": "chance", "last_token": "last token alone", "bigram_table": "bigram table alone",
    "whole": "whole model", "whole_fitted": "  its logits fitted",
    "random_order": "  tokens in random order", "nothing": "all nodes ablated",
    "found": "nodes that were found", "found_fitted": "  their logits fitted",
    "circuit": "CIRCUIT", "circuit_fitted": "  its logits fitted", "without": "model without the circuit",
    "without_random": "model without random nodes", "random": "random nodes",
    "weights_drawn_anew": "weights drawn anew", "weights_shuffled": "weights shuffled",
    "labels_shuffled": "labels shuffled",
}


def table_of(results):
    """A row of texts for each result of HEADINGS: heading, loss, accuracy, nodes, edges, a note. Of several
    draws, the range of their losses and accuracies."""
    rows = []
    for key, heading in HEADINGS.items():
        draws = results.get(key, [])
        draws = draws if isinstance(draws, list) else [draws]
        if draws:
            (low, high), (worst, best) = ((min(v), max(v)) for v in
                                          ([d[of] for d in draws] for of in ("loss", "accuracy")))
            loss = f"{low:.3f}" + (f" to {high:.3f}" if len(draws) > 1 else "")
            accuracy = f"{worst:.1%}" + (f" to {best:.1%}" if len(draws) > 1 else "")
            size = [f"{draws[0][of]:,}" if of in draws[0] else "" for of in ("nodes", "edges")]
            reached = "" if "reached" not in draws[0] else "{reached} of {of} reached".format(**draws[0])
            rows.append([heading, loss, accuracy, *size, reached])
    return rows


def print_table(rows, judged_by):
    print(f"\n{judged_by}; loss of the choice between the answers, in nats\n")
    head = ["", "loss", "accuracy", "nodes", "edges", ""]
    for heading, loss, accuracy, nodes, edges, note in [head, *rows]:
        print(f"{heading:28}{loss:>15}{accuracy:>17}{nodes:>8}{edges:>9}   {note}".rstrip())


def print_intervention(record):
    print(f"{record['site']} {', '.join(map(str, record['channels']))}: " + "; ".join(
        "{what} in the {where} {loss:.3f} ({0:.0%} and {1:.0%} right)".format(
            *r["accuracy_of_each"], what=what, where=where.replace("whole", "whole model"), **r)
        for what in ("removed", "reversed") for where in ("whole", "circuit")
        for r in [record[f"{what}_in_{where}"]]))
    if "attention" in record:
        print("    attention of its head to the token that it attends to most: {attention:.2f}; removed "
              "{attention_removed:.2f}, reversed {attention_reversed:.2f}".format(**record))


def print_rest(results):
    """What is no line of the table."""
    c, w = results["circuit"], results["whole"]
    print(f"\nsize: {c['nodes']:,} of {w['nodes']:,} nodes, {c['edges']:,} of {w['edges']:,} edges "
          f"({c['weights']:,} weights between these nodes); and, "
          f"not counted in these, {c['biases']} biases, {c['embedding']:,} weights of the embedding and "
          f"{c['unembedding']:,} of the unembedding")
    seeds = results["seeds"]
    print(f"mask seeds at penalty {seeds['penalty']:g}: {seeds['nodes']} nodes, {seeds['weights']} weights "
          f"between them; "
          f"pairs share {[round(x, 2) for x in seeds['overlaps']]} of their nodes; of all {seeds['of']} "
          f"runs {seeds['failed']} failed")
    if "faithfulness" not in results:
        return
    same = results["faithfulness"]
    back = ", ".join(f"{float(share):.0%}: {np.mean(losses):.3f} (at most {max(losses):.3f})"
                     for share, losses in same["given_back"].items())
    print(f"same answer as the whole model: {same['same_answer']:.1%}; correlation of the logit "
          f"differences: {same['correlation']:.2f}\nloss as random ablated nodes are given back: {back}")
    for name, pair in results["beyond"].items():
        print(f"beyond, {name}: " + "; all nodes ablated: ".join(
            "{right:.1%} right (whole model {whole_right:.1%}), same answer {same_answer:.1%}, correlation "
            "{correlation:.2f}".format(**pair[which])
            for which in ("circuit", "nothing")))
    for head, x in same["attention"].items():
        print("head {0}: attention to its first choice {whole:.2f} in the whole model, {circuit:.2f} in the "
              "circuit; {same:.2f} of all attention is the same".format(head, **x))
    print("variance that nodes keep in the circuit (1: all): "
          + "; ".join(f"{name} " + " ".join("none" if x is None else f"{x:.2f}"
                                            for x in shares.values())
                      for name, shares in results["survival"].items()))
    for record in results["interventions"]:
        print_intervention(record)
    print(f"\n{CAVEATS}")
