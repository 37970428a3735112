"""The format of the released models: what is written is what their loader wants, what is read is the same
model bit for bit, and what has no place here is refused by name.
"""
import dataclasses
import json
import os
import shutil

import pytest
import torch

import released
from checkpoints import load_checkpoint, model_of
from conftest import checkpoint, frozen, read, run, weights
from kernels import use_sparse_linears_
from model import AbsTopK, GPTConfig
from test_sparsity import tiny_model
from tokenizer import read_tokenizer


def edit_released(folder, tensors=None, **keys):
    """Change keys of beeg_config.json ("absent" deletes), and the state dict by the function `tensors`."""
    path = folder / "beeg_config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    if tensors:
        state = torch.load(folder / "final_model.pt", weights_only=True)
        torch.save(tensors(state), folder / "final_model.pt")


@pytest.fixture
def write(tmp_path):
    """write(**config) writes a random model in the format of the released ones: (model, folder)."""

    def write_random(**changes):
        model, folder = tiny_model(vocab_size=257, **changes), tmp_path / "released"
        model.tokenizer_name = "bytes"
        released.write(model, folder)
        return model, folder

    return write_random


RELEASED = [
    {}, {"tie_embeddings": True}, {"use_positional_embeddings": True}, {"use_attention_sinks": False},
    {"use_rms_norm": False, "use_bias": False}, {"use_bigram_table": False}, {"n_head": 2}, {"n_head": 8},
    {"activation_topk_fraction": 1.0}, {"residual_activation": "relu", "activation": "relu", "d_mlp": 24},
]


def test_state_dict_names_are_gpt2s():
    """Exactly the names that other tools look for; parts that are switched off have none."""
    block = ["ln_1.weight", "attn.sink_logit", "attn.c_attn.weight", "attn.c_attn.bias",
             "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "mlp.c_fc.weight", "mlp.c_fc.bias",
             "mlp.c_proj.weight", "mlp.c_proj.bias"]
    names = {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight", "bigram_table",
             *(f"transformer.h.{i}.{name}" for i in range(2) for name in block)}
    biases = {name for name in names if name.endswith("bias")}
    sinks = {name for name in names if name.endswith("sink_logit")}
    norm_biases = {name.replace("weight", "bias") for name in names if ".ln_" in name}
    assert set(tiny_model().state_dict()) == names
    assert set(tiny_model(tie_embeddings=True).state_dict()) == names
    assert set(tiny_model(use_positional_embeddings=True).state_dict()) == names | {"transformer.wpe.weight"}
    assert set(tiny_model(use_bias=False).state_dict()) == names - biases
    assert set(tiny_model(use_attention_sinks=False).state_dict()) == names - sinks
    assert set(tiny_model(use_bigram_table=False).state_dict()) == names - {"bigram_table"}
    assert set(tiny_model(use_rms_norm=False).state_dict()) == names | norm_biases


@pytest.mark.parametrize("changes", RELEASED, ids=str)
def test_a_model_survives_the_released_format(write, changes):
    """Written and read again it has the same configuration, weights and logits, bit for bit."""
    model, folder = write(**changes)
    again = released.read(folder)
    assert again.config == model.config
    ours, theirs = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    idx = torch.randint(257, (2, 8))
    assert torch.equal(again(idx)[0], model(idx)[0])


@pytest.mark.parametrize("changes", RELEASED, ids=str)
def test_what_is_written_fits_the_released_loader(write, changes):
    """It has exactly the configuration keys that the authors' classes have, and tensors of their shapes."""
    _, folder = write(**changes)
    config = json.loads((folder / "beeg_config.json").read_text())
    assert set(config) == {
        "block_size", "vocab_size", "n_layer", "n_head", "d_head", "d_model", "dropout", "bias", "ln_bias",
        "rms_norm", "residual_activation_type", "activation_type", "afrac", "afrac_loctypes", "debug_nans",
        "tied_unembed", "tokenizer_name", "grad_checkpointing", "d_mlp", "enable_bigram_table",
        "learnable_bigram_table", "d_pos_emb", "dropout_cat_pos_emb", "sinusoidal_cat_pos_emb",
        "enable_sparse_kernels", "flash", "sink"}
    C, V, M = config["d_model"], config["vocab_size"], config["d_mlp"]
    W = config["n_head"] * config["d_head"]
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (config["block_size"], C),
              "lm_head.weight": (V, C), "final_logits_bias": (V,)}
    if config["enable_bigram_table"]:
        shapes["bigram_table"] = (V, V)
    norms = {"transformer.ln_f": C}
    for i in range(config["n_layer"]):
        h = f"transformer.h.{i}."
        norms |= {h + "ln_1": C, h + "ln_2": C}
        for name, rows, columns in (("attn.c_attn", 3 * W, C), ("attn.c_proj", C, W),
                                    ("mlp.c_fc", M, C), ("mlp.c_proj", C, M)):
            shapes[f"{h}{name}.weight"] = (rows, columns)
            if config["bias"]:
                shapes[f"{h}{name}.bias"] = (rows,)
        if config["sink"]:
            shapes[h + "attn.attn_imp.sink_logit"] = (config["n_head"],)
    for name, size in norms.items():
        shapes[name + ".weight"] = (size,)
        if not config["rms_norm"]:
            shapes[name + ".bias"] = (size,)
    tensors = torch.load(folder / "final_model.pt", weights_only=True)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes


def test_older_and_sparser_spellings_are_read(write):
    """n_mlp for d_mlp, keys left out that have a default, null sizes, a causal mask and no final bias."""
    model, folder = write(use_attention_sinks=False, d_mlp=24)

    def older(tensors):
        del tensors["final_logits_bias"]
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        return tensors

    edit_released(folder, older, n_mlp=24, d_head=None, d_mlp="absent", sink="absent", flash="absent",
                  d_pos_emb="absent", dropout="absent", residual_activation_type="absent")
    again = released.read(folder)
    assert again.config == model.config
    idx = torch.randint(257, (2, 8))
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_released_half_precision_becomes_float32(write):
    """float16 weights are read as the float32 of the same value."""
    model, folder = write()
    edit_released(folder, lambda tensors: {k: t.half() for k, t in tensors.items()})
    for a, b in zip(released.read(folder).parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.half().float())


def test_unknown_keys_of_a_released_model_are_warned_of(write):
    """They are named, not dropped silently, and the model is read."""
    _, folder = write()
    edit_released(folder, dan_test=3)
    with pytest.warns(UserWarning, match="dan_test"):
        released.read(folder)


def test_released_positions_are_kept_unless_they_are_zero(write):
    """A zero wpe adds nothing and becomes no parameter; any other is one."""
    _, folder = write()
    assert not released.read(folder).config.use_positional_embeddings
    wpe = torch.zeros(8, 16)
    wpe[3, 3] = 1e-3
    edit_released(folder, lambda tensors: tensors | {"transformer.wpe.weight": wpe})
    model = released.read(folder)
    assert torch.equal(model.transformer.wpe.weight, wpe)


def test_a_released_bigram_table_that_is_fixed_stays_so(write, tmp_path):
    """It is read without gradient, and written as not learnable again."""
    _, folder = write()
    edit_released(folder, learnable_bigram_table=False)
    model = released.read(folder)
    assert not model.bigram_table.requires_grad
    released.write(model, tmp_path / "again")
    assert not json.loads((tmp_path / "again" / "beeg_config.json").read_text())["learnable_bigram_table"]


def with_tensor(name, value):
    return lambda tensors: tensors | {name: value}


def without_tensor(name):
    return lambda tensors: {k: t for k, t in tensors.items() if k != name}


@pytest.mark.parametrize("changes, tensors, keys, word", [
    ({}, None, {"d_pos_emb": 32}, "d_pos_emb"),
    ({}, None, {"use_tied_aux_matrix": True}, "use_tied_aux_matrix"),
    ({"use_rms_norm": False}, None, {"ln_bias": False}, "LayerNorms without bias"),
    ({}, with_tensor("final_logits_bias", torch.ones(257)), {}, "final_logits_bias"),
    ({}, with_tensor("transformer.h.0.extra.weight", torch.ones(2)), {}, "extra"),
    ({}, without_tensor("transformer.h.1.mlp.c_fc.weight"), {}, "c_fc"),
    ({}, with_tensor("lm_head.weight", torch.ones(3, 16)), {}, "lm_head"),
    ({"tie_embeddings": True}, with_tensor("lm_head.weight", torch.ones(257, 16)), {}, "tied_unembed"),
    ({}, None, {"enable_bigram_table": False}, "bigram_table"),
    ({}, None, {"sink": False}, "sink_logit"),
    ({}, None, {"n_layer": "absent"}, "n_layer"),
    ({}, None, {"afrac_loctypes": "attn_in,attn_pattern"}, "attn_pattern"),
    ({}, None, {"activation_type": "silu"}, "silu"),
    ({}, None, {"d_model": "wide"}, "beeg_config.json"),
    *(({}, None, {key: value}, f"{key}=.* is no ") for key, value in [
        ("afrac_loctypes", 0), ("afrac_loctypes", ["attn_in"]), ("block_size", 1.5), ("n_head", 2.0),
        ("n_layer", 2.0), ("vocab_size", 257.0), ("dropout", None), ("bias", 1), ("afrac", "0.25"),
        ("d_mlp", "64"), ("activation_type", None), ("d_model", True)]),
    ({}, None, {"d_head": None, "n_head": 0}, "beeg_config.json"),
])
def test_a_released_model_that_does_not_fit_is_refused(write, changes, tensors, keys, word):
    """In one sentence that names the part; nothing is dropped silently."""
    _, folder = write(**changes)
    edit_released(folder, tensors, **keys)
    with pytest.raises(ValueError, match=word) as error:
        released.read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, error", [
    ("final_model.pt", b"not a checkpoint", ValueError), ("final_model.pt", None, OSError),
    ("final_model.pt", b".", ValueError), ("final_model.pt", b"G12", ValueError),
    ("beeg_config.json", b"{", ValueError), ("beeg_config.json", b"[1]", ValueError),
    ("beeg_config.json", b"\xff", ValueError), ("beeg_config.json", b'{"a":' * 100_000, ValueError),
    ("beeg_config.json", None, OSError),
])
def test_broken_files_of_a_released_model_are_refused(write, name, content, error):
    """A file that is missing is an OSError, one that makes no sense a ValueError."""
    _, folder = write()
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(error):
        released.read(folder)


def test_a_model_is_not_written_over_another(write):
    """A folder that holds a model is refused."""
    model, folder = write()
    with pytest.raises(FileExistsError, match="choose another folder"):
        released.write(model, folder)


def with_field(model, name, value):
    """Give the model the configuration of a fork that has a field more."""
    forked = dataclasses.make_dataclass("Forked", [(name, type(value), value)], bases=(GPTConfig,))
    model.config = forked(**vars(model.config))


class SignedTopK(AbsTopK):
    """What a fork might put in the place of AbsTopK."""


FORKS = {
    "rotary": lambda model: with_field(model, "rotary", True),
    "silu": lambda model: vars(model.config).update(activation="silu"),
    "attn_z": lambda model: vars(model.config).update(activation_sparsity_locations="attn_in,attn_z"),
    "SignedTopK": lambda model: setattr(model.transformer.h[1].attn, "attn_q", SignedTopK(4)),
    "q_gain": lambda model: model.transformer.h[0].attn.register_parameter("q_gain", model.bigram_table),
    "without lm_head": use_sparse_linears_,
}


@pytest.mark.parametrize("part", FORKS)
def test_what_the_format_cannot_say_is_not_written(part, tmp_path):
    """A fork with another activation, rotation, site or parameter is refused by name; nothing is written."""
    model = tiny_model(d_model=32)
    model.prune_(0.15)
    FORKS[part](model)
    with pytest.raises(ValueError, match=part):
        released.write(model, tmp_path / "fork")
    assert not (tmp_path / "fork").exists()


def test_heads_that_their_loader_refuses_are_not_written(tmp_path):
    """The published configuration wants d_model to be a multiple of n_head."""
    with pytest.raises(ValueError, match="3 heads"):
        released.write(tiny_model(n_head=3), tmp_path / "heads")


def test_a_field_of_a_fork_that_is_off_does_no_harm(tmp_path):
    """What is False, 0 or empty is not there."""
    model = tiny_model()
    with_field(model, "rotary", False)
    released.write(model, tmp_path / "fork")


def test_a_released_model_is_trained_on_and_sampled(write, here, capsys):
    """--init_from=FOLDER starts training from its weights and shapes, and samples them; the run resumes."""
    model, folder = write(block_size=16, n_head=2)
    small = "--device=cpu --compile=False --batch_size=2 --gradient_accumulation_steps=1 --eval_iters=1"
    start = f"train.py --init_from={folder} --dataset=tiny --target_l0_fraction=1 --learning_rate=0 {small}"
    assert run(f"{start} --max_iters=2") == 0
    assert weights() == frozen(model.state_dict())
    assert run("train.py --init_from=resume --max_iters=3 --learning_rate=1e-3") == 0
    assert checkpoint()["step"] == 3 and checkpoint()["config"]["n_head"] == 2
    capsys.readouterr()
    edit_released(folder, tokenizer_name="tinypython_2k")
    assert run(f"sample.py --init_from={folder} --device=cpu") == 2  # which says where it comes from
    [line] = capsys.readouterr().err.splitlines()
    assert "tinypython_2k" in line and "pip install git+https://github.com/openai/circuit_sparsity" in line
    (folder / "tokenizer.json").write_text(read("data/tiny/tokenizer.json"))
    assert run(f"sample.py --init_from={folder} --num_samples=1 --max_new_tokens=20 --device=cpu") == 0
    assert run(f"{start} --d_model=32") == 2
    edit_released(folder, learnable_bigram_table=False)
    assert run(start) == 2


def test_a_tokenizer_is_known_by_its_contents(tmp_path, here, capsys):
    """What was trained with one tokenizer goes on with the same one, not with another of the same name."""
    texts = {name: read(f"data/{name}/tokenizer.json") for name in ("tiny", "other")}
    for name, text in texts.items():
        vocab_size = json.loads(read(f"data/{name}/meta.json"))["vocab_size"]
        model = tiny_model(vocab_size=vocab_size, block_size=16)
        renamed = text.replace('"bytes"', '"bpe"')  # as every trained tokenizer is called
        released.write(model, tmp_path / name, renamed)
        assert read(tmp_path / name / "tokenizer.json") == renamed
        named = json.loads(read(tmp_path / name / "beeg_config.json"))["tokenizer_name"]
        assert named == f"bpe, sha256 {read_tokenizer(tmp_path / name / 'tokenizer.json')[1]}"
    flags = "--device=cpu --compile=False --batch_size=2 --eval_iters=1 --max_iters=1 --target_l0_fraction=1"
    assert run(f"train.py --init_from={tmp_path / 'other'} --dataset=other {flags}") == 0
    assert run(f"train.py --init_from={tmp_path / 'tiny'} --dataset=other --out_dir=new {flags}") == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_a_tokenizer_whose_file_is_lost_is_still_known(trained, capsys):
    """By its digest in beeg_config.json: data of another tokenizer is refused, and so is another file."""
    model = model_of(load_checkpoint("out/ckpt.pt"))
    released.write(model, "exported")  # without the text of the tokenizer
    again = released.read("exported")
    assert again.tokenizer_sha256 == model.tokenizer_sha256 == read_tokenizer("data/tiny/tokenizer.json")[1]
    flags = "--device=cpu --compile=False --batch_size=2 --eval_iters=1 --max_iters=1 --target_l0_fraction=1"
    text = read("data/tiny/tokenizer.json")
    shutil.copytree("data/tiny", "data/renamed")  # as many tokens of the same kind, but another tokenizer
    with open("data/renamed/tokenizer.json", "w", encoding="utf-8", newline="") as f:
        f.write(text + "\n")
    meta = json.loads(read("data/renamed/meta.json"))
    meta["tokenizer_sha256"] = read_tokenizer("data/renamed/tokenizer.json")[1]
    with open("data/renamed/meta.json", "w", encoding="utf-8") as f:
        json.dump(meta, f)
    assert run(f"train.py --init_from=exported --dataset=renamed --out_dir=new {flags}") == 2
    assert "tokenizer" in capsys.readouterr().err
    assert run(f"train.py --init_from=exported --dataset=tiny --out_dir=new {flags}") == 0
    shutil.copy("data/renamed/tokenizer.json", "exported")
    with pytest.raises(ValueError, match="is not the tokenizer that"):
        released.read("exported")
    with pytest.raises(ValueError, match="is not the tokenizer.json of the model"):
        released.write(model, "again", text + "\n")
    assert not os.path.exists("again")


def test_ln_bias_means_nothing_to_a_model_with_rms_norm(write):
    """RMSNorm has no bias, whatever the configuration says of those of LayerNorms."""
    _, folder = write()
    edit_released(folder, ln_bias=False)
    released.read(folder)


def test_keys_that_are_left_out_have_their_loaders_defaults():
    """A beeg_config.json of sizes alone is a dense GPT-2 with tied embeddings."""
    config = released.config_of(
        {"block_size": 8, "vocab_size": 11, "n_layer": 1, "n_head": 2, "d_model": 16})
    assert config == GPTConfig(
        block_size=8, vocab_size=11, n_layer=1, n_head=2, d_model=16, d_head=8, d_mlp=64, use_rms_norm=False,
        tie_embeddings=True, use_bigram_table=False, use_attention_sinks=False, activation_topk_fraction=1.0,
        activation_sparsity_locations="attn_in,attn_out,mlp_in,mlp_out")
