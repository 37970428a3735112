"""What circuit.py prints of a circuit: the results of circuits/controls.py as a table, the rest in words."""
import numpy as np

CAVEATS = """The circuit chooses between two given answers. It is sufficient, and as necessary as the table
says, under this ablation and on these contexts. That does not prove that the model computes the task so:
norms and AbsTopK react to what is ablated, and causal scrubbing would ask for more."""
HEADINGS = {
    "chance": "chance", "last_token": "last token alone", "bigram_table": "bigram table alone",
    "whole": "whole model", "whole_fitted": "  its logits fitted",
    "random_order": "  tokens in random order", "nothing": "all nodes ablated",
    "nothing_fitted": "  the logits fitted",
    "found": "nodes that were found", "found_fitted": "  their logits fitted",
    "circuit": "CIRCUIT", "circuit_fitted": "  its logits fitted", "without": "model without the circuit",
    "without_fitted": "  its logits fitted",
    "without_random": "model without random nodes", "random": "random nodes",
    "random_edges": "random edges", "weights_drawn_anew": "weights drawn anew",
    "weights_shuffled": "weights shuffled", "labels_shuffled": "labels shuffled",
    "answers_exchanged": "answers exchanged", "another_task": "after another task's text",
}


def table_of(results):
    """A row of texts for each result of HEADINGS: heading, loss, accuracy, nodes, edges, a note. Of several
    draws, the range of their losses and accuracies. Random draws and searches have their logits fitted."""
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


def print_heads(heads):
    for head, of in heads.items():
        print(f"head {head} finds (attention of the last token; values "
              f"{', '.join(map(str, of['channels']))}; adds to {' against '.join(of['answers'])}):")
        for token, share, values, adds, times in of["tokens"]:
            print(f"    {token:16}{share:6.2f}   {' '.join(f'{v:+.2f}' for v in values)}   {adds:+.2f}"
                  f"   in {times} places")
        print(f"    attention to {of['tokens'][0][0]} by distance: " + ", ".join(
            f"under {far} back {share:.2f}" if far < 2**30 else f"farther {share:.2f}"
            for far, share in of["distance"]))


def print_rest(results):
    """What is no line of the table."""
    c, w = results["circuit"], results["whole"]
    print(f"\nsize: {c['nodes']:,} of {w['nodes']:,} nodes, {c['edges']:,} of {w['edges']:,} edges "
          f"({c['weights']:,} weights between these nodes); and, "
          f"not counted in these, {c['biases']} biases, {c['embedding_of_tokens']:,} weights of the "
          f"embedding of tokens that occur here ({c['embedding']:,} of all tokens), "
          f"{c['embedding_of_positions']} of that of positions, and "
          f"{c['unembedding_of_answers']} of the unembedding of the answers ({c['unembedding']:,} of all)")
    ranks = results["first_of_all"]
    print("of all tokens the right answer is the likeliest in {whole:.1%} of contexts in the whole model, "
          "in {circuit:.1%} in the circuit".format(**ranks))
    if results["rules"]:
        print("rules that need no model, right answers: " + ", ".join(
            f"whose first character {rule} {share:.1%}" for rule, share in results["rules"].items()))
    seeds = results["seeds"]
    print(f"mask seeds at penalty {seeds['penalty']:g}: {seeds['nodes']} nodes, {seeds['weights']} weights "
          f"between them; pairs share {[round(x, 2) for x in seeds['overlaps']]} of their nodes; of all "
          f"{seeds['of']} runs {seeds['failed']} failed")
    print_heads(results["heads"])
    if "faithfulness" not in results:
        return
    print("the rest of the model ablated otherwise, with the circuit's fit: " + "; ".join(
        f"{how} {r['loss']:.3f} ({r['accuracy']:.1%})" for how, r in results["otherwise"].items()))
    same = results["faithfulness"]
    back = ", ".join(f"{float(share):.0%}: {np.mean(losses):.3f} (at most {max(losses):.3f})"
                     for share, losses in same["given_back"].items())
    print(f"same answer as the whole model: {same['same_answer']:.1%}; correlation of the logit "
          f"differences: {same['correlation']:.2f}\nloss as random ablated nodes are given back: {back}")
    for name, pair in results["beyond"].items():
        right = "{right:.1%} right (whole model {whole_right:.1%}), " * (name != "ordinary text")
        print(f"beyond, {name}: " + "; all nodes ablated: ".join(
            (right + "same answer {same_answer:.1%}, correlation {correlation:.2f}").format(**pair[which])
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
    for record in results["exchanges"]:
        print("{site} {0} as in the twin of each of {twins} contexts: the whole model's answer changes in "
              "{kept:.1%}; all others of the site: in {others:.1%}".format(
                  ", ".join(map(str, record["channels"])), **record))
    print(f"\n{CAVEATS}")
