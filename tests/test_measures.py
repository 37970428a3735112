"""What is measured and logged: the evaluation, the statistics of gradients, weights, activations and
sparsity, each against numbers counted by hand; when each is logged, and what wandb gets.
"""
import math
import os
import re
import sys
import time
import types

import numpy as np
import pytest
import torch

import measures
import runs
from conftest import SPEED, call_before, checkpoint, finish, launch, log, run
from model import LOCATIONS
from test_sparsity import CPU, ranks, some_data, some_tokens, tiny_model

PRUNED_GROUPS = ["wte", "lm_head", *(f"{matrix}{end}" for end in ("", ".bias") for matrix in (
    "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))]
GROUPS = [*PRUNED_GROUPS, "ln_1", "ln_2", "ln_f", "attn.sink_logit", "bigram_table"]
LOGGED = {
    "log_every_n_steps": {
        "loss", "lr", "l0", "tokens", "grad_rms", *SPEED, "activations/kurtosis_resid_final",
        *(f"activations/{what}/{where}" for what in ("nonzero", "rms") for where in LOCATIONS)},
    "log_gradients_every_n_steps": {f"gradients/norm_{what}" for what in ("mean", "max", "min")},
    "log_weights_every_n_steps": {f"weights/{what}/{g}" for what in ("norm", "mean", "std") for g in GROUPS},
    "log_sparsity_every_n_steps": {
        "sparsity/l0", "sparsity/l0_target", "sparsity/sharkfin", "sparsity/dead_neurons",
        *(f"sparsity/{what}" for what in ("nonzero", "fraction")),
        *(f"sparsity/{what}/{g}" for what in ("nonzero", "fraction") for g in PRUNED_GROUPS)},
    "eval_interval": {
        "val/best_loss",
        *(f"{split}/{what}" for split in ("train", "val") for what in ("loss", "bits_per_byte"))},
}


def test_evaluation_is_fixed_complete_and_shared(monkeypatch):
    """Evaluation reports the same at each call, on windows from the first token to the last; the ranks'
    shares add up. It draws no random number and leaves the model in training mode."""
    monkeypatch.setattr(runs.Process, "sum", lambda self, *values: list(values))
    data, model = some_data(), tiny_model(dropout=0.5)
    starts = {len(data.train): [], len(data.val): []}
    random_state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(measures, "windows", lambda tokens, starting, *rest: (
            starts[len(tokens)].extend(starting), runs.windows(tokens, starting, *rest))[1])
        record = measures.estimate_loss(model, data, CPU, 3, 2)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    for split, tokens in (("train", data.train), ("val", data.val)):
        first, *between, last = starts[len(tokens)]
        assert (first, len(between), last) == (0, 3 * 2 - 2, len(tokens) - 1 - 8)
        rows = torch.tensor(np.array([tokens[start:start + 9] for start in starts[len(tokens)]], int))
        nats = model.eval()(rows[:, :-1], rows[:, 1:])[1].item()
        assert record[f"{split}/loss"] == pytest.approx(nats)
        shares = [measures.estimate_loss(model, data, process, 3, 2) for process in ranks(2)]
        shares = [share[f"{split}/loss"] for share in shares]
        assert nats == pytest.approx(sum(shares)) and min(shares) > 0
        bits = nats * data.meta[split]["tokens"] / math.log(2)
        assert record[f"{split}/bits_per_byte"] == pytest.approx(bits / data.meta[split]["bytes"])
    assert measures.estimate_loss(model, data, CPU, 3, 2) == record


@pytest.mark.parametrize("every", [(2, 3, 4, 5, 6), (5, 1, 0, 2, 100), (0, 0, 7, 0, 1)])
def test_everything_is_logged_at_its_frequency(here, every):
    """Each group of keys is complete at the multiples of its setting and at the end of the run, and absent
    at all other steps; 0 is never."""
    flags = " ".join(f"--{name}={n}" for name, n in zip(LOGGED, every))
    assert run(f"train.py tiny.py --use_bigram_table=True --max_iters=13 {flags}") == 0
    found = {}
    for record in log():
        found.setdefault(record["step"], set()).update(record.keys() - {"step"})
    expected = {}
    for (name, keys), n in zip(LOGGED.items(), every):
        last = 13 if name == "eval_interval" else 12
        for step in range(last + 1):
            if n and (step % n == 0 or step == last):
                expected.setdefault(step, set()).update(keys)
    assert found == expected


def test_logged_numbers_of_a_run(here, monkeypatch):
    """Rates, L0, tokens and the gradients' norms and RMS are those of the step that they are logged for."""
    norms = []
    call_before(monkeypatch, "update_", lambda model, optimizer, scaler, step: norms.append(
        [np.sqrt(np.sum(p.grad.numpy().astype(float) ** 2)) for p in model.parameters()]))
    assert run("train.py tiny.py --log_gradients_every_n_steps=1 --log_sparsity_every_n_steps=1") == 0
    numel = sum(w.numel() for w in checkpoint()["model"].values())
    records = [record for record in log() if "loss" in record]
    assert [record["step"] for record in records] == list(range(12))
    for step, (record, norm) in enumerate(zip(records, norms)):
        done = min(max((step - 0.01 * 12) / (0.49 * 12), 0), 1)
        l0 = 1 - 0.75 * done
        assert record["sparsity/l0"] == record["l0"] == pytest.approx(l0)
        assert record["sparsity/l0_target"] == 0.25
        assert record["sparsity/sharkfin"] == pytest.approx(l0 ** -0.5)
        assert record["lr"] == pytest.approx(1e-2 * (1 - step / 12) * l0 ** -0.5)
        assert record["tokens"] == (step + 1) * 2 * 2 * 16
        assert record["grad_rms"] == pytest.approx(math.sqrt(sum(n**2 for n in norm) / numel), rel=1e-4)
        assert record["gradients/norm_mean"] == pytest.approx(np.mean(norm), rel=1e-4)
        assert record["gradients/norm_max"] == pytest.approx(max(norm), rel=1e-4)
        assert record["gradients/norm_min"] == pytest.approx(min(norm), rel=1e-4)
        assert 0 < record["tokens_per_second"] and record["seconds_left"] >= 0
    assert records[-1]["seconds_left"] == 0
    assert records[-1]["sparsity/fraction"] == pytest.approx(0.25, abs=0.01)


def test_speed_is_that_since_it_was_last_logged(here, monkeypatch):
    """A slow step counts in the record that it is part of, and in no later one."""
    call_before(monkeypatch, "update_", lambda model, optimizer, scaler, step: time.sleep(step == 2))
    assert run("train.py tiny.py --log_every_n_steps=2") == 0
    speed = {record["step"]: record["tokens_per_second"] for record in log() if "loss" in record}
    assert speed[2] < 2 * 64 < 4 * 64 < speed[4]


def two_layers():
    """A pruned model of two layers with three dead neurons: rows 3 and 4 of a c_fc, column 5 of a c_proj."""
    model = tiny_model()
    model.prune_(0.4)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[3:5] = 0
        model.transformer.h[1].attn.c_proj.weight[:, 5] = 0
    return model


def arrays_by_group(model):
    """All weights of a model as float64 arrays, flat, by the group that they are logged in."""
    groups = {}
    for name, p in model.named_parameters():
        layer = re.match(r"transformer\.h\.\d+\.(.*)", name)
        name = (layer[1] if layer else name.removeprefix("transformer.")).removesuffix(".weight")
        groups.setdefault(name, []).append(p.detach().numpy().astype(float).ravel())
    return {name: np.concatenate(parts) for name, parts in groups.items()}


def test_sparsity_statistics_count_what_is_there():
    """Nonzeros and fractions in all and per tensor group, and dead neurons, counted one by one."""
    model = two_layers()
    found, arrays = measures.sparsity_statistics(model), arrays_by_group(model)
    total = size = 0
    for group in PRUNED_GROUPS:
        nonzero = sum(x != 0 for x in arrays[group].tolist())
        assert found[f"sparsity/nonzero/{group}"] == nonzero
        assert found[f"sparsity/fraction/{group}"] == pytest.approx(nonzero / len(arrays[group]))
        total, size = total + nonzero, size + len(arrays[group])
    assert (found["sparsity/nonzero"], found["sparsity/fraction"]) == (total, pytest.approx(total / size))
    assert found["sparsity/dead_neurons"] == 3
    assert not any("bigram" in key or "ln_" in key or "sink" in key for key in found)


def test_weight_statistics_are_those_of_numpy():
    """Norm, mean and standard deviation of a tensor group are those of all its numbers in one array."""
    model = two_layers()
    found = measures.weight_statistics(model)
    assert found.keys() == LOGGED["log_weights_every_n_steps"]
    for group, array in arrays_by_group(model).items():
        assert found[f"weights/norm/{group}"] == pytest.approx(np.linalg.norm(array), rel=1e-5)
        assert found[f"weights/mean/{group}"] == pytest.approx(array.mean(), rel=1e-4, abs=1e-7)
        assert found[f"weights/std/{group}"] == pytest.approx(array.std(), rel=1e-4, abs=1e-6)


def test_gradient_statistics_are_those_of_the_unscaled_loss():
    """float16's loss is scaled; the norms that are logged are of the gradients without that."""
    found, m = [], tiny_model()
    for scale in (1.0, 1024.0):
        m.zero_grad()
        torch.manual_seed(0)
        x = torch.randint(m.config.vocab_size, (2, 8))
        (m(x, x)[1] * scale).backward()
        found.append(measures.gradient_statistics(m, scale))
    assert found[1] == pytest.approx(found[0])


def test_activation_statistics_are_those_of_numpy():
    """Fraction of nonzeros and RMS of every node site, averaged over layers, and the kurtosis of the final
    residual stream without tokens at which it is zero: of one token at each position."""
    model, seen = two_layers(), {}
    alive = (torch.arange(8) != 4)[:, None]
    model.transformer.h[1].register_forward_hook(lambda module, inputs, output: output * alive)
    measures.watch_activations(model)

    def see(location, output):
        seen.setdefault(location, []).append(
            np.stack([output[t % 3, t].detach().numpy().astype(float) for t in range(8)]))

    for location, module in [*model.sites(), ("final", model.transformer.h[1])]:
        module.register_forward_hook(lambda module, inputs, output, at=location: see(at, output))
    model(some_tokens(3, 8))
    found, [final] = measures.activation_statistics(model), seen.pop("final")
    assert found.keys() == {key for key in LOGGED["log_every_n_steps"] if key.startswith("activations/")}
    for location, layers in seen.items():
        assert len(layers) == 2
        nonzero, rms = [(x != 0).mean() for x in layers], [np.sqrt((x ** 2).mean()) for x in layers]
        assert found[f"activations/nonzero/{location}"] == pytest.approx(np.mean(nonzero))
        assert found[f"activations/rms/{location}"] == pytest.approx(np.mean(rms), rel=1e-5)
    assert not final[4].any()
    centred = np.delete(final, 4, axis=0)
    centred -= centred.mean(-1, keepdims=True)
    kurtosis = ((centred ** 4).mean(-1) / (centred ** 2).mean(-1) ** 2).mean()
    assert found["activations/kurtosis_resid_final"] == pytest.approx(kurtosis, rel=1e-4)


def test_wandb_disabled(here, monkeypatch):
    """With WANDB_MODE=disabled the real package takes every record of log.jsonl, and writes nothing."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    records, finished = [], []
    init = wandb.init

    def watched_init(**arguments):
        wandb_run = init(**arguments)
        assert wandb_run.disabled
        wandb_run.log = lambda record, step: records.append({**record, "step": step})
        wandb_run.finish = lambda: finished.append(len(records))
        return wandb_run

    monkeypatch.setattr(wandb, "init", watched_init)
    assert run("train.py tiny.py --wandb_log=True") == 0
    assert records == log() and finished == [len(records)]
    assert not os.path.exists("out/wandb") and not os.path.exists("wandb")


def test_a_resumed_run_goes_on_in_its_wandb_run(here, monkeypatch):
    """The id is kept in the checkpoint, also by a stretch of the run that did not log to wandb."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    asked, given, init = [], [], wandb.init

    def watched_init(**arguments):
        asked.append((arguments["id"], arguments["resume"]))
        given.append(init(**arguments))
        return given[-1]

    monkeypatch.setattr(wandb, "init", watched_init)
    assert run("train.py tiny.py --wandb_log=True --max_iters=4") == 0
    assert run("train.py --init_from=resume --wandb_log=False --max_iters=8") == 0
    assert run("train.py --init_from=resume --wandb_log=True --max_iters=12") == 0
    assert asked == [(None, None), (given[0].id, "allow")] and given[0].id


def test_a_folder_named_wandb_is_not_the_package(here, monkeypatch, capsys):
    """Without wandb, a folder of that name is imported as an empty module: the run says what to install."""
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    assert run("train.py tiny.py --wandb_log=True") == 2
    assert capsys.readouterr().err.startswith("error: wandb is not installed")


@pytest.mark.slow
def test_wandb_offline(here):
    """With WANDB_MODE=offline the real package keeps the run in out_dir, and no account is needed."""
    fault = "os.environ |= {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}"
    assert finish(launch("train.py tiny.py --wandb_log=True --wandb_run_name='a name'", fault=fault))[0] == 0
    [folder] = [name for name in os.listdir("out/wandb") if name.startswith("offline-run-")]
    [name] = [name for name in os.listdir(f"out/wandb/{folder}") if name.endswith(".wandb")]
    with open(f"out/wandb/{folder}/{name}", "rb") as f:
        data = f.read()
    for text in (b"a name", b"val/bits_per_byte", b"sparsity/dead_neurons", b"target_l0_fraction"):
        assert text in data


@pytest.mark.slow
def test_wandb_without_an_account(here):
    """Asked for wandb on a machine that is not logged in, the run says so in one line, before it begins."""
    status, error = finish(launch("train.py tiny.py --wandb_log=True", fault="""
        os.environ |= {"HOME": os.getcwd(), "WANDB_MODE": "online"}
        os.environ.pop("WANDB_API_KEY", None)
        """))
    assert status == 2
    assert "wandb login" in error.splitlines()[-1] and "Traceback" not in error
