"""The controls of a circuit: what a sceptic asks, as functions that circuit.py calls.

Results are dicts: loss and accuracy of the choice between two answers, nodes and edges. `fit`, a pair, is
the scale and the shift that go with a circuit. At the end, for searches of their own: models and labels
with what was learned destroyed.
"""
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from circuits.nodes import count, hooks, survival
from circuits.search import apply_fit, find, fit_of, loss_at, loss_of
from configurator import fail
from model import GPT
from tokenizer import spell

DRAWS = 5  # of random nodes
GIVEN_BACK = (0.1, 0.25, 0.5, 0.75)  # shares of the ablated nodes
LARGE = 0.1  # a circuit with a larger share of all nodes explains little
FEW = 100  # contexts that choose the size and the fit, fewer than which may mislead
CARRIES = 1.5  # times the target is the loss, at most, of a circuit that carries over

# ----------------------------------------------------------------------------------------------------------
# results


def result(logits):
    """Loss, standard error (if contexts are independent), accuracy; of logits (n, 2), the right first."""
    losses, margin = loss_of(logits), logits[:, 0] - logits[:, 1]
    return {"loss": losses.mean().item(), "standard_error": (losses.std() / len(losses)**0.5).item(),
            "accuracy": (margin.sign() / 2 + 0.5).mean().item()}  # a tie is half right


def fitted(nodes, gates, choosing, judging):
    """The result when the logits are scaled, and one answer's shifted, to do best on train."""
    scale, shift = fit_of(nodes.judge(choosing, gates), choosing.sides())
    return result(apply_fit(nodes.judge(judging, gates), judging.sides(), scale, shift))


def shares_before(train, answers):
    """Of each of these tokens, a list, how often train has each token before it, as a share: token -> array
    of 2**16. Each costs a pass over train."""
    before, after, shares = train[:-1], train[1:], {}
    for answer in answers:
        times = np.bincount(before[after == answer], minlength=2**16)
        shares[answer] = times / max(times.sum(), 1)
    return shares


def last_token_alone(shares, contexts):
    """Logits (n, 2) of how often train has each answer after the last token, as if both were as frequent;
    `shares` from `shares_before`."""
    rows = zip(contexts.last_tokens()[:, 0].tolist(), contexts.answers.tolist(), strict=True)
    found = torch.tensor([[shares[answer][last] for answer in pair] for last, pair in rows])
    found = found.to(contexts.idx.device)
    return (found + 1e-5).log()  # about one occurrence: what is not in train decides nothing


def random_like(nodes, gates, generator):
    """Gates of as many nodes at each site, drawn among those that are ever active."""
    drawn = torch.zeros_like(gates)
    for name, part in nodes.split(drawn).items():
        live = nodes.means[name].nonzero()[:, 0]
        shuffled = live[torch.randperm(len(live), generator=generator).to(live.device)]
        part[shuffled[:int(nodes.split(gates)[name].sum())]] = 1
    return drawn


def bigrams_alone(model, contexts):
    """Logits (n, 2) of the bigram table alone."""
    bigrams = torch.zeros(len(contexts), 1, model.config.vocab_size, device=contexts.idx.device)
    bigrams = (bigrams + F.embedding(contexts.last_tokens(), model.bigram_table))[:, 0]
    return bigrams.gather(1, contexts.answers)


def of_the_last_token(model, train, choosing, judging, fit=True):
    """Results on `judging` of what knows the last token alone, with `fit` after a fit on `choosing`: name ->
    dict. What bigrams solve is no task for a circuit."""
    found, answers = {}, torch.cat([choosing.answers, judging.answers]).unique().tolist()
    for name, alone, of in (("bigram_table", bigrams_alone, model),
                            ("last_token", last_token_alone, shares_before(train, answers))):
        scale_and_shift = fit_of(alone(of, choosing), choosing.sides()) if fit else (1.0, 0.0)
        found[name] = result(apply_fit(alone(of, judging), judging.sides(), *scale_and_shift))
    return found


def baselines(nodes, train, choosing, judging, seed, fit=True):
    """Results on `judging` without a circuit: name -> dict. What is as easy in random order asks only which
    tokens there are. Only what knows the last token alone is fitted."""
    ones = torch.ones(nodes.number, device=nodes.device)
    return {
        "whole": result(nodes.judge(judging, ones)) | count(nodes, ones),
        "random_order": result(nodes.judge(judging.in_random_order(seed), ones)),
        **of_the_last_token(nodes.model, train, choosing, judging, fit),
        "nothing": result(nodes.judge(judging, 0 * ones)) | count(nodes, 0 * ones),
        "chance": result(torch.zeros(len(judging), 2)),
    }


def random_draws(nodes, gates, choosing, judging, seed):
    """Results, fitted, of as many random nodes per site, as a circuit and when ablated: two lists."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [random_like(nodes, gates, generator) for _ in range(DRAWS)]
    return ([fitted(nodes, g, choosing, judging) | count(nodes, g) for g in drawn],
            [fitted(nodes, g, choosing, judging) | count(nodes, g) for g in map(nodes.others, drawn)])


def agreement(nodes, gates, contexts, fit=(1.0, 0.0)):
    """How often the whole model chooses the same answer, right or wrong, as the circuit with its `fit`; the
    correlation of how much the answer of the lower id is preferred, 0 if one of the two does not vary; how
    often either is right."""
    whole, inside = (contexts.sides() * (c[:, 0] - c[:, 1]) for c in (
        nodes.judge(contexts, torch.ones_like(gates)),
        apply_fit(nodes.judge(contexts, gates), contexts.sides(), *fit)))
    right = contexts.sides() > 0
    return {"right": ((inside > 0) == right).float().mean().item(),
            "whole_right": ((whole > 0) == right).float().mean().item(),
            "same_answer": ((whole > 0) == (inside > 0)).float().mean().item(),
            "correlation": torch.corrcoef(torch.stack([whole, inside]))[0, 1].nan_to_num().item()}


def attention_kept(nodes, gates, contexts):
    """'block.head' of each head with a kept node -> the last token's attention to the token that it attends
    to most in the whole model, there and in the circuit, and how much of all its attention, the sink's
    included, is the same."""
    found, heads = {}, nodes.kept_heads(gates)
    for block in sorted({block for block, _ in heads}):
        whole, inside = (nodes.attention(contexts, g, block) for g in (torch.ones_like(gates), gates))
        first = whole.argmax(2, keepdim=True)
        in_whole, in_circuit = (attention.gather(2, first).mean((0, 2)) for attention in (whole, inside))
        same = torch.minimum(whole, inside).sum(2) + torch.minimum(1 - whole.sum(2), 1 - inside.sum(2))
        same = same.mean(0)  # with what goes to the sink
        found |= {f"{b}.{h}": {"whole": in_whole[h].item(), "circuit": in_circuit[h].item(),
                               "same": same[h].item()} for b, h in heads if b == block}
    return found


def faithfulness(nodes, gates, contexts, seed, fit=(1.0, 0.0)):
    """Whether the circuit with its `fit` errs where the whole model errs, and, without it, gets better as
    nodes are given back."""
    off = (gates[:nodes.nodes] == 0).nonzero()[:, 0]
    generator, losses = torch.Generator().manual_seed(seed), {share: [] for share in GIVEN_BACK}
    for _ in range(DRAWS):
        order = off[torch.randperm(len(off), generator=generator).to(off.device)]
        for share in GIVEN_BACK:
            more = gates.clone()
            more[order[:int(share * len(off))]] = 1
            losses[share].append(loss_of(nodes.judge(contexts, more)).mean().item())
    return agreement(nodes, gates, contexts, fit) | {
        "attention": attention_kept(nodes, gates, contexts),
        "given_back": {str(share): values for share, values in losses.items()}}


def first_of_all(nodes, gates, contexts):
    """In what share of the contexts the right answer has the largest logit of the whole vocabulary."""
    right = [nodes.next_logits(batch, gates).argmax(1) == batch.answers[:, 0]
             for batch in contexts.batches()]
    return torch.cat(right).float().mean().item()


def simple_rules(contexts, tokenizer):
    """How often rules are right that need no model: the answer whose first character is the more frequent in
    the context, and the one whose first character came last. Empty if the answers begin alike."""
    right = {"is more frequent": [], "came last": []}
    for row, last in enumerate(contexts.last.tolist()):
        text = tokenizer.decode(contexts.idx[row, :last + 1].tolist())
        good, bad = (tokenizer.decode([i]).lstrip()[:1] for i in contexts.answers[row].tolist())
        if good == bad:
            return {}
        for rule, of in (("is more frequent", text.count), ("came last", text.rfind)):
            right[rule].append((np.sign(of(good) - of(bad)) + 1) / 2)  # a tie is half right
    return {rule: float(np.mean(found)) for rule, found in right.items()}


@torch.no_grad()
def rest_otherwise(nodes, gates, contexts, text, fit, seed):
    """Results of the circuit when what is outside it is not at its mean: name -> result.

    At zero; at what it is in another context of the task that is no shorter, at the same position, or at the
    last token where nothing else matters; in any `text` (Contexts as long); in another context that is drawn
    anew for each node and each token. Removed edges stay removed, and folded nodes what they always are.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    n, last = len(contexts), contexts.last.cpu()
    order = last.argsort(descending=True, stable=True)
    no_shorter = (last >= last[:, None]).sum(1)  # so many contexts, the first of this order
    step = 1 + (torch.rand(n, generator=generator) * (no_shorter - 1)).long()  # none is its own, if it can
    others = contexts[order[(order.argsort() + step) % no_shorter].to(nodes.device)]
    rows = torch.randint(len(text), (n,), generator=generator).to(nodes.device)
    texts = replace(contexts, idx=text.idx[rows, -contexts.idx.size(1):])

    def judge(donors=None, mixed=False):
        logits = []
        for rows in torch.arange(n, device=nodes.device).split(64):
            values = {site: torch.zeros_like(x) for site, x in nodes.ablated.items()}
            if donors:
                some = donors[rows]
                some = some[some.last.argsort(descending=True)] if mixed else some
                nodes.logits(some, torch.ones_like(gates), watch=values.__setitem__)
            if mixed:
                longer = (some.last.cpu() >= torch.arange(some.idx.size(1))[:, None]).sum(1)[:, None]
                values = {site: x.gather(0, (torch.rand(x.shape, generator=generator) * (
                    longer if x.size(1) > 1 else len(x))).long().to(x.device)) for site, x in values.items()}
            for site, channel in nodes.folded:
                values[site][..., channel] = nodes.ablated[site][channel]
            logits.append(nodes.logits(contexts[rows], gates, instead=values))
        return result(apply_fit(torch.cat(logits), contexts.sides(), *fit))

    found["at zero"] = judge()
    found["as in another context of the task"] = judge(others)
    found["as in any text"] = judge(texts)
    found["from another context for each node and token"] = judge(others, mixed=True)
    return found


def random_edges(nodes, number, choosing, judging, seed):
    """Results, fitted, of so many random edges, with all the nodes that they join, as a circuit: a list."""
    generator, drawn = torch.Generator().manual_seed(seed), []
    every = nodes.edges_in(torch.ones(nodes.nodes, device=nodes.device))
    for _ in range(DRAWS if number else 0):
        edges = {every[i][:4] for i in torch.randperm(len(every), generator=generator)[:number].tolist()}
        kept = torch.zeros(nodes.nodes, device=nodes.device)
        for a, i, b, o in edges:
            kept[[nodes.places[a] + i, nodes.places[b] + o]] = 1
        inside = nodes.with_edges([edge[:4] for edge in nodes.edges_in(kept)])
        kept = torch.cat([kept, kept.new_tensor([edge in edges for edge in inside.edges])])
        drawn.append(fitted(inside, kept, choosing, judging) | count(inside, kept))
    return drawn


def embedding_weights(nodes, gates, contexts):
    """Nonzero weights of the embedding, of tokens and of positions that occur in the contexts, at channels
    that kept nodes read; and of the unembedding, of the answers, at channels that they write."""
    kept, number = nodes.kept(gates), {}
    model = nodes.model
    tokens = [contexts.idx[row, :last + 1] for row, last in enumerate(contexts.last.tolist())]
    positions = getattr(model.transformer.wpe, "weight", model.lm_head.weight[:0])
    for key, weight, ids, end in (
            ("embedding_of_tokens", model.transformer.wte.weight, torch.cat(tokens).unique(), "_in"),
            ("embedding_of_positions", positions, slice(int(contexts.last.max()) + 1), "_in"),
            ("unembedding_of_answers", model.lm_head.weight, contexts.answers.unique(), "_out")):
        channels = sorted({c for site, of in kept.items() if site.endswith(end) for c in of})
        number[key] = int(weight[ids][:, channels].count_nonzero())
    return number


FARTHEST = (2, 4, 8, 16, 32, 64, 2**30)  # tokens back: the steps in which attention by distance is told
LISTED = 8  # tokens of a head
ALIKE = 3  # tokens in which a context and its twin may differ


@torch.no_grad()
def heads_of(nodes, gates, contexts, tokenizer):
    """'block.head' of each head with a kept value -> what it finds in the circuit: a dict.

    "tokens": rows [token, attention, [value of each kept channel], what one unit of attention to it adds to
    the logit of the answer of lower id less that of the other, number of places], of those tokens that take
    most attention in all. What it adds is the direct path: value, kept weights out, norm, unembedding.
    "distance": [tokens back, mean attention to the first of these tokens], up to that distance from the one
    before.
    """
    inside, model, found = nodes.activations(contexts, gates), nodes.model, {}
    real = torch.arange(contexts.idx.size(1), device=nodes.device) <= contexts.last[:, None]
    back = (contexts.last[:, None] - torch.arange(contexts.idx.size(1), device=nodes.device))[real]
    first, second = contexts.answers[0].sort().values
    toward = model.transformer.ln_f.weight * (model.lm_head.weight[first] - model.lm_head.weight[second])
    if not model.config.use_rms_norm:
        toward = toward - toward.mean()
    toward = toward / final_scale(nodes, gates, contexts)
    ids, which, times = contexts.idx[real].unique(return_inverse=True, return_counts=True)
    edges = nodes.edges_in(gates)
    for block, head in nodes.kept_heads(gates):
        site, d_head = f"{block}.attn.attn_v", model.config.d_head
        channels = [c for c in nodes.kept(gates).get(site, ()) if c // d_head == head]
        if not channels:
            continue
        attention = nodes.attention(contexts, gates, block)[:, head][real]
        adds = sum((weight * toward[o] * inside[site][:, c] for a, c, _, o, weight in edges
                    if a == site and c in channels), torch.zeros_like(attention))

        def mean(x):
            return x.new_zeros(len(ids)).index_add_(0, which, x) / times

        share, added, values = mean(attention), mean(adds), [mean(inside[site][:, c]) for c in channels]
        top = (share * times).argsort(descending=True)[:LISTED].tolist()
        listed = torch.isin(which, torch.tensor(top[:1], device=nodes.device))
        steps = [(back < far) & (back >= near) & listed
                 for near, far in zip((0, *FARTHEST), FARTHEST, strict=False)]
        found[f"{block}.{head}"] = {
            "channels": channels, "answers": [spell(tokenizer, int(i)) for i in (first, second)],
            "tokens": [[spell(tokenizer, int(ids[i])), share[i].item(), [v[i].item() for v in values],
                        added[i].item(), int(times[i])] for i in top],
            "distance": [[far, attention[step].mean().item()]
                         for far, step in zip(FARTHEST, steps, strict=True) if step.any()]}
    return found


def final_scale(nodes, gates, contexts):
    """What the last norm divides by in the circuit, on average."""
    seen = []
    with hooks([(nodes.model.transformer.ln_f, seen.append)], before=True):
        nodes.judge(contexts, gates)
    x = torch.cat(seen)
    if not nodes.model.config.use_rms_norm:
        x = x - x.mean(-1, keepdim=True)
    return x.square().mean(-1).sqrt().mean()


def interventions(nodes, gates, contexts, fit=(1.0, 0.0)):
    """Results when kept nodes are removed or reversed: for each query, key, value and neuron, and for all
    queries, keys or values of a head together. A list of dicts.

    In the whole model and in the circuit with its `fit`, with the accuracy for either answer, that of the
    lower id first.
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
                    if where == "circuit":
                        logits = apply_fit(logits, contexts.sides(), *fit)
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


def twins(contexts):
    """For each context one of the other answer whose text is as long and differs in fewest tokens: the rows
    (m), and their twins (m), of those for which that is at most ALIKE tokens."""
    sides, rows, others = contexts.sides(), [], []
    for row in range(len(contexts)):
        differ = (contexts.idx != contexts.idx[row]).sum(1)
        differ[(sides == sides[row]) | (contexts.last != contexts.last[row])] = contexts.idx.size(1) + 1
        if differ.min() <= ALIKE:
            rows.append(row)
            others.append(int(differ.argmin()))
    return (torch.tensor(x, dtype=torch.long, device=contexts.idx.device) for x in (rows, others))


@torch.no_grad()
def exchanges(nodes, gates, contexts):
    """How often the whole model's answer changes when nodes are what they are in the twin of a context: for
    the kept nodes of each site, and for all other nodes of it. A list of dicts, empty without twins."""
    (rows, others), found = twins(contexts), []
    if not len(rows):
        return []
    ones = torch.ones_like(gates)
    for site, channels in nodes.kept(gates).items():
        only, rest = ones.clone(), ones.clone()
        nodes.split(only)[site][channels] = 0
        nodes.split(rest)[site].zero_()[channels] = 1
        changed = {"kept": 0, "others": 0}
        for some, twin in zip(rows.split(64), others.split(64), strict=True):
            values = {}
            nodes.logits(contexts[twin], ones, watch=values.__setitem__)
            before = nodes.logits(contexts[some], ones)
            for which, passed in (("kept", only), ("others", rest)):
                after = nodes.logits(contexts[some], passed, instead=values)
                flipped = (before[:, 0] > before[:, 1]) != (after[:, 0] > after[:, 1])
                changed[which] += int(flipped.sum())
        found.append({"site": site, "channels": channels, "twins": len(rows)} | {
            which: number / len(rows) for which, number in changed.items()})
    return found


# ----------------------------------------------------------------------------------------------------------
# before and after a search


def check_able(name, nodes, train, choosing, target, fit, reason=""):
    """End the script if the whole model does not do the task, for which there may be a known `reason`; warn
    if it takes no circuit to do it. Returns the whole model's loss on contexts of train."""
    ones = torch.ones(nodes.number, device=nodes.device)
    loss, able = loss_at(nodes, choosing, ones, fit), result(nodes.judge(choosing, ones))
    if loss > target:
        remedy = reason or (f"it could reach --target_loss={1.25 * loss:.2f}" if 1.25 * loss < 0.6 else
                  "that is about chance, 0.69: train it further, or choose another task")
        fail(f"the whole model does not do {name}: its loss is {loss:.3f} (accuracy {able['accuracy']:.1%}) "
             f"on {len(choosing)} contexts of train, above the target of {target:g}; {remedy}. What "
             "it can do: python -m circuits.askable --out_dir=...")
    for rule, known in of_the_last_token(nodes.model, train, choosing, choosing, fit).items():
        if known["loss"] <= target:
            print(f"warning: the {rule.replace('_', ' ')} alone reaches the target, {known['loss']:.3f}: "
                  "a circuit of this task shows little; choose a lower --target_loss, or another task")
    return loss


def warnings_of(nodes, runs, chosen, gates, sets, loss, target):
    """What the reader of the result should know of the search, a line each. `loss` is the circuit's, fitted
    if the target is, on the last of the three `sets` of contexts, of which the middle one chose it."""
    _, choosing, judging = sets
    if loss > CARRIES * target:
        yield (f"the circuit is worse where it is judged: its loss there is {loss:.3f}, far above the "
               f"target of {target:g}; more, and more different, contexts to choose by may help")
    if len(choosing) < FEW:
        yield f"only {len(choosing)} contexts chose the size and the fit: write some hundreds of prompts"
    tried = sorted({run["penalty"] for run in runs})
    if chosen["penalty"] in (tried[0], tried[-1]):
        yield (f"the best penalty, {chosen['penalty']:g}, is at the edge of those tried, {tried[0]:g} to "
               f"{tried[-1]:g}: a smaller circuit may lie beyond")
    if count(nodes, gates)["nodes"] > LARGE * nodes.nodes:
        yield "the circuit has more than a tenth of all nodes: it explains little"
    if (number := judging.pairs()) > 1:
        yield f"the task has {number} pairs of answers: the picture and what heads add are of one of them"


# ----------------------------------------------------------------------------------------------------------
# what was learned, destroyed


def drawn_anew(model, seed):
    """The same model, its weights drawn anew and pruned to as many, or to what a floor of 4 needs."""
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


def exchanged(contexts):
    """The same contexts, the two answers of each exchanged: consistent, and nonsense."""
    return replace(contexts, answers=contexts.answers.flip(1))


def asked_after(others, contexts):
    """The contexts of another task with the answers of this one, the right one where the other task's right
    one has the lower id: consistent, and nothing that the model has learned."""
    pair = contexts.answers[0].sort().values
    lower = (others.sides() > 0)[:, None]
    return replace(others, answers=torch.where(lower, pair, pair.flip(0)), positions=None)


def search_again(name, nodes, sets, target, how, trials):
    """The search with something of it destroyed: how many of its runs reach the target, and the best.
    `sets`: contexts to learn on, to choose the size on, to judge by; `trials` and `how` as in `find`."""
    learning, choosing, judging = sets
    runs = find(nodes, learning, choosing, target, how, name, trials)
    best = min(runs, key=lambda run: (run["nodes"] or nodes.number + 1, run["lowest_loss"]))
    return {"reached": sum(run["nodes"] is not None for run in runs), "of": len(runs),
            "lowest_loss": best["lowest_loss"]} | fitted(nodes, best["gates"], choosing, judging) | count(
                nodes, best["gates"])


def searches(nodes, nodes_of, sets, others, target, how, trials, seed):
    """All searches with something destroyed: yields name and result of each as it is done. `nodes_of` makes
    Nodes of another model; `others`: three sets of another task, or none."""
    whole = nodes.with_edges(())
    labels = {"labels_shuffled": [shuffled_labels(contexts, seed) for contexts in sets],
              "answers_exchanged": [exchanged(contexts) for contexts in sets]}
    if others:
        labels["another_task"] = [asked_after(other, contexts)
                                  for other, contexts in zip(others, sets, strict=True)]
    for name, labelled in labels.items():
        yield name, search_again(name.replace("_", " "), whole, labelled, target, how, trials)
    for name, destroy in (("weights_drawn_anew", drawn_anew), ("weights_shuffled", shuffled_weights)):
        other = nodes_of(destroy(nodes.model, seed))
        yield name, search_again(name.replace("_", " "), other, sets, target, how, trials)


def seeds_agree(nodes, runs):
    """The sizes that the mask seeds end at, at the penalty of most of them, and the overlap of their nodes,
    by pairs: nodes of both over nodes of either."""
    penalties = [run["penalty"] for run in runs]
    penalty = max(penalties, key=penalties.count)
    same = [run for run in runs if run["penalty"] == penalty and run["nodes"]]
    overlaps = [((a["gates"] * b["gates"]).sum() / (a["gates"] + b["gates"]).clamp(max=1).sum()).item()
                for i, a in enumerate(same) for b in same[:i]]
    return {"penalty": penalty, "nodes": [run["nodes"] for run in same],
            "weights": [count(nodes, run["gates"])["edges"] for run in same], "overlaps": overlaps,
            "failed": sum(run["nodes"] is None for run in runs), "of": len(runs)}


def without_searches(nodes, gates, plain, sets, beyond, fit, seed):
    """All that is asked of a circuit besides its own result, but for the searches: name -> result. `plain`:
    the Nodes before the search, without edges or folded nodes."""
    (_, choosing, judging), rest = sets, nodes.others(gates)
    nothing = torch.zeros(plain.number, device=plain.device)
    random, without_random = random_draws(plain, gates[:plain.number], choosing, judging, seed)
    return {
        "nothing_fitted": fitted(plain, nothing, choosing, judging),
        "without": result(nodes.judge(judging, rest)) | count(nodes, rest),
        "without_fitted": fitted(nodes, rest, choosing, judging),
        "without_random": without_random, "random": random,
        "random_edges": random_edges(plain, count(nodes, gates)["edges"], choosing, judging, seed),
        "otherwise": rest_otherwise(nodes, gates, judging, beyond["ordinary text"], fit, seed),
        "faithfulness": faithfulness(nodes, gates, judging, seed, fit),
        "beyond": {name: {"circuit": agreement(nodes, gates, contexts, fit),
                          "nothing": agreement(plain, nothing, contexts)}
                   for name, contexts in beyond.items()},  # of "ordinary text" no answer is right
        "survival": {name: {c: round(x[c].item(), 4) if x[c].isfinite() else None
                            for c in nodes.kept(gates)[name]}
                     for name, x in survival(nodes, judging, gates).items() if name in nodes.kept(gates)},
        "interventions": interventions(nodes, gates, judging, fit),
        "exchanges": exchanges(nodes, gates, judging)}
