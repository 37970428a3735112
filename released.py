"""The format of github.com/openai/circuit_sparsity: a folder with beeg_config.json and final_model.pt.

Models that were released in it can be sampled from and trained on here; one that was trained here opens in
the authors' viewer. Nothing is dropped silently, nor written that the format cannot say.
"""
import json
import os
import warnings

import torch

from configurator import read_json, shown
from model import GPT, GPTConfig
from tokenizer import name_with_digest, tokenizer_in, tokenizer_named

NAMES = {  # key of beeg_config.json -> field of GPTConfig
    "block_size": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
    "d_head": "d_head", "d_model": "d_model", "d_mlp": "d_mlp", "dropout": "dropout", "bias": "use_bias",
    "rms_norm": "use_rms_norm", "residual_activation_type": "residual_activation",
    "activation_type": "activation", "afrac": "activation_topk_fraction",
    "afrac_loctypes": "activation_sparsity_locations", "tied_unembed": "tie_embeddings",
    "enable_bigram_table": "use_bigram_table", "sink": "use_attention_sinks"}
DEFAULTS = {  # of the keys that a beeg_config.json may lack
    "d_head": None, "d_mlp": None, "dropout": 0.0, "bias": True, "rms_norm": False,
    "residual_activation_type": "identity", "activation_type": "gelu", "afrac": None,
    "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out", "tied_unembed": True, "enable_bigram_table": False,
    "sink": False}
OTHER = {  # their other keys, at what we write
    "ln_bias": True, "flash": True, "grad_checkpointing": False, "debug_nans": False, "d_pos_emb": None,
    "dropout_cat_pos_emb": False, "sinusoidal_cat_pos_emb": False, "enable_sparse_kernels": False,
    "learnable_bigram_table": False, "tokenizer_name": "bpe"}
OLD = {"n_mlp", "bigram_table_rank", "use_tied_aux_matrix"}  # keys of older files
LEGAL = {"activation": ("gelu", "relu"), "residual_activation": ("identity", "relu")}  # frozen, as are these
THEIR_LOCATIONS = {"attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out",
                   "resid_post_attn", "resid_post_mlp"}
WORDS = {"transformer", "h", "wte", "wpe", "ln_1", "attn", "c_attn", "c_proj", "sink_logit", "ln_2", "mlp",
         "c_fc", "ln_f", "lm_head", "weight", "bias", "bigram_table"}  # of parameters' names


def read(folder):
    """The model in `folder`; its `tokenizer_name`, and the `tokenizer_sha256` of a tokenizer.json or None.

    Raises OSError if a file cannot be read and ValueError, in one sentence, if the model has a part that GPT
    lacks: nothing is dropped but constants, and unknown keys of the configuration are warned of.
    """
    theirs = read_json(os.path.join(folder, "beeg_config.json"))
    path = os.path.join(folder, "final_model.pt")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name.replace("attn.attn_imp.", "attn."): t for name, t in tensors.items()
                   if not (t.ndim == 4 and name.endswith(".attn.bias"))}  # a causal mask
    except Exception as e:  # what torch.load raises depends on what is in the file
        if isinstance(e, OSError):
            raise
        raise ValueError(f"{path} cannot be read as a state dict ({type(e).__name__})") from None
    config = config_of(theirs)
    if tensors.pop("final_logits_bias", torch.zeros(1)).any():
        raise ValueError(f"{path} has a nonzero final_logits_bias, for which there is no place here")
    positions = tensors.get("transformer.wpe.weight", torch.zeros(1))
    config.use_positional_embeddings = bool(positions.any())
    for name, is_used in (("transformer.wpe.weight", config.use_positional_embeddings),
                          ("bigram_table", config.use_bigram_table)):
        if not is_used and not tensors.get(name, torch.ones(1)).any():
            del tensors[name]  # zeros: adding them does nothing
    if config.tie_embeddings:
        wte = tensors.setdefault("transformer.wte.weight", tensors.get("lm_head.weight"))
        if wte is None or not torch.equal(wte, tensors.setdefault("lm_head.weight", wte)):
            raise ValueError(f"{path} holds two embeddings where beeg_config.json says tied_unembed")
    model = GPT(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        reason = " ".join(str(e).split("\n", 1)[-1].split())
        raise ValueError(f"{path} does not fit its beeg_config.json: {reason}") from None
    if config.use_bigram_table and not theirs.get("learnable_bigram_table", False):
        model.bigram_table.requires_grad_(False)
    name = theirs.get("tokenizer_name", "tinypython_2k")
    model.tokenizer_name, model.tokenizer_sha256 = tokenizer_named(name, tokenizer_in(folder))
    return model


def config_of(theirs):
    """The GPTConfig that a beeg_config.json (a dict) means. Raises ValueError on what is not here."""
    for is_there, part in (
        (theirs.get("d_pos_emb") is not None, "concatenated positional embeddings (d_pos_emb)"),
        (theirs.get("use_tied_aux_matrix"), "an auxiliary matrix (use_tied_aux_matrix)"),
        (not theirs.get("rms_norm") and not theirs.get("ln_bias", True), "LayerNorms without bias"),
    ):
        if is_there:
            raise ValueError(f"the model has {part}, for which there is no part here: it cannot be read")
    unknown = ", ".join(sorted(theirs.keys() - NAMES.keys() - OTHER.keys() - OLD))
    if unknown:
        warnings.warn(f"beeg_config.json has keys that mean nothing here: {unknown}", stacklevel=3)
    values = DEFAULTS | theirs | ({"d_mlp": theirs["n_mlp"]} if "n_mlp" in theirs else {})  # its older name
    try:
        values["d_head"] = values["d_head"] or values["d_model"] // values["n_head"]
        values["d_mlp"] = values["d_mlp"] or 0
        values["afrac"] = 1.0 if values["afrac"] is None else values["afrac"]
        for key, name in NAMES.items():
            expected = type(getattr(GPTConfig, name))
            if expected is float and type(values[key]) is int:
                values[key] = float(values[key])
            if type(values[key]) is not expected:
                raise TypeError(f"{key}={shown(values[key])} is no {expected.__name__}")
        return GPTConfig(**{name: values[key] for key, name in NAMES.items()})
    except (KeyError, TypeError, ZeroDivisionError, OverflowError) as e:
        raise ValueError(f"beeg_config.json lacks or misstates a key ({e})") from None


def check_can_be_written(model, names):
    """Raise ValueError, in one sentence, unless the format can say all of a model of parameters `names`."""
    config, known = model.config, {*NAMES.values(), "use_positional_embeddings"}
    # what a fork adds must be off: False, 0 or empty
    unsaid = [f"{name}={value!r}" for name, value in vars(config).items()
              if (value and name not in known) or value not in LEGAL.get(name, (value,))]
    unsaid += sorted(set(config.locations) - THEIR_LOCATIONS)
    unsaid += sorted({type(module).__name__ for _, module in model.sites()} - {"AbsTopK", "Identity"})
    unsaid += [name for name in names if {word for word in name.split(".") if not word.isdigit()} - WORDS]
    if config.d_model % config.n_head:  # their configuration refuses it
        unsaid.append(f"{config.n_head} heads in a d_model of {config.d_model}")
    if not unsaid:
        with torch.device("meta"):
            unsaid = [f"a model without {name}" for name in sorted(GPT(config).state_dict().keys() - names)]
    if unsaid:
        raise ValueError(f"the released format cannot say {unsaid[0]}: such a model is not written")


def write(model, folder, tokenizer=None):
    """Write the model to `folder`, and beside it `tokenizer`, the text of its run's tokenizer.json.

    Raises FileExistsError if there is a model already, ValueError if the format cannot say all of this one.
    """
    config, tensors = model.config, model.state_dict()
    check_can_be_written(model, tensors.keys())
    path = os.path.join(folder, "beeg_config.json")
    if os.path.exists(path):
        raise FileExistsError(f"{path} exists: choose another folder")
    theirs = OTHER | {key: getattr(config, name) for key, name in NAMES.items()} | {
        "afrac": None if config.activation_topk_fraction == 1 else config.activation_topk_fraction,
        "afrac_loctypes": ",".join(config.locations),
        "learnable_bigram_table": config.use_bigram_table and model.bigram_table.requires_grad,
        "tokenizer_name": name_with_digest(model, tokenizer)}
    tensors = {name.replace("attn.sink_", "attn.attn_imp.sink_"): t.cpu() for name, t in tensors.items()}
    tensors.setdefault("transformer.wpe.weight", torch.zeros(config.block_size, config.d_model))
    tensors["final_logits_bias"] = torch.zeros(config.vocab_size)
    os.makedirs(folder, exist_ok=True)
    torch.save(tensors, os.path.join(folder, "final_model.pt"))
    if tokenizer:
        with open(tokenizer_in(folder), "w", encoding="utf-8", newline="") as f:
            f.write(tokenizer)
    with open(path, "w", encoding="utf-8") as f:  # last: with it, the folder holds a model
        json.dump(theirs, f, indent=2)
