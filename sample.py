"""Print what a trained model writes, as it writes it.

    python sample.py --out_dir=out/quickstart --start="def " --temperature=0.8
    python sample.py --out_dir=out/quickstart --start=FILE:prompt.txt
"""
import codecs
import os

import tiktoken
import torch

import kernels
from checkpoints import load_checkpoint, load_start, model_of
from configurator import configure, ends_explained, fail, one_line
from runs import this_process
from tokenizer import PLUG_IN, load_tokenizer, read_tokenizer, token_bytes, tokenizer_in

out_dir = "out"  # of the training run; or the folder of a released model
checkpoint = "ckpt.pt"  # in out_dir: 'ckpt.pt' is the latest, 'best.pt' the sparsest of least val loss
init_from = "resume"  # out_dir's checkpoint; or another's path, or the folder of a released model
start = "<|endoftext|>"  # the prompt, or FILE:path of a text with it; the default begins a new document
num_samples = 3
max_new_tokens = 200
temperature = 0.8  # 0: always the likeliest token; 1: as the model predicts
top_k = 200  # draw among the k likeliest tokens; 0: among all
seed = 1337
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1'
dtype = "auto"  # of autocast: 'auto', 'float32', 'bfloat16', 'float16'
fast_kernels = True  # False: the definitions of model.py run as they stand there, and zeros are multiplied


def check_sampling():
    least = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}
    for name, value in least.items():
        if not globals()[name] >= value:
            fail(f"{name}={globals()[name]} must be at least {value}")
    if seed >= 2**63:
        fail(f"seed={seed} must have at most 63 bits")


def load_model(given):
    """The model to sample from, and its tokenizer. `given` are the names of the settings that were set."""
    if init_from == "resume" and os.path.exists(os.path.join(out_dir, "beeg_config.json")):
        model, path = load_start(out_dir)
    elif init_from == "resume":
        model = model_of(load_checkpoint(os.path.join(out_dir, checkpoint)))
        path = tokenizer_in(out_dir)
    elif "out_dir" in given:
        fail("init_from and out_dir name a model each: leave one of them out")
    else:
        model, path = load_start(init_from, checkpoint if "checkpoint" in given else None)
    if not all(p.isfinite().all() for p in model.parameters()):
        fail("the model has weights that are no numbers, as of a training that exploded: choose another")
    try:
        if not model.tokenizer_sha256:  # a released model names a tiktoken encoding
            if model.tokenizer_name not in tiktoken.list_encoding_names():
                raise ValueError(f"{model.tokenizer_name} is no tiktoken encoding; {PLUG_IN}")
            return model, tiktoken.get_encoding(model.tokenizer_name)
        if read_tokenizer(path)[1] != model.tokenizer_sha256:
            raise ValueError(f"{path} is not the one that the model was trained with")
        return model, load_tokenizer(path)
    except (OSError, ValueError) as e:
        fail(f"no tokenizer ({one_line(e)}): copy the tokenizer.json of the model's data to {path}")


def read_prompt(tokenizer, block_size):
    """The prompt's token ids, (1, T)."""
    text = start
    if start.startswith("FILE:"):
        try:
            with open(os.path.expanduser(start[len("FILE:"):]), encoding="utf-8-sig") as f:
                text = f.read()
        except (OSError, UnicodeDecodeError) as e:
            fail(f"cannot read the prompt {start[len('FILE:'):]} ({e}): give the path of a UTF-8 text")
    text = text or "<|endoftext|>"
    for character in text:
        try:
            for byte in character.encode():
                tokenizer.encode_single_token(bytes([byte]))
        except (UnicodeEncodeError, KeyError):
            fail(f"the tokenizer cannot spell {character!r}: leave it out of the prompt")
    ids = tokenizer.encode(text, allowed_special="all")
    if len(ids) > block_size:
        fail(f"the prompt has {len(ids)} tokens, more than the model's window of {block_size}: shorten it")
    return torch.tensor([ids])


@ends_explained("choose a smaller --max_new_tokens, or --device=cpu")
def main():
    given = configure(globals())
    check_sampling()
    process = this_process(device, dtype)
    model, tokenizer = load_model(given)
    prompt = read_prompt(tokenizer, model.config.block_size).to(process.device)
    model.to(process.device)
    kernels.enabled = fast_kernels
    if fast_kernels and process.device.type == "cpu":
        kernels.use_sparse_linears_(model)
    torch.manual_seed(seed)
    for number in range(1, num_samples + 1):
        print(f"---------- sample {number} of {num_samples}")
        # a character may be spelt by several tokens: the decoder prints it when its last byte has come
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(tokenizer.decode(prompt[0].tolist()), end="", flush=True)
        with process.autocast():
            for token in model.stream(prompt, max_new_tokens, temperature, top_k or None):
                print(decoder.decode(token_bytes(tokenizer, token.item())), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    main()
