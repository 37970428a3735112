# The paper-like run: 8 GPUs, a public corpus of Python code, all settings those of train.py but these.
#   python prepare.py --dataset=codeparrot/codeparrot-clean-train --text_column=content --name=codeparrot \
#       --max_tokens=10_000_000_000
#   torchrun --nproc_per_node=8 train.py config/sparse_python.py
# As many tokens as the corpus has, in random windows. Expected: 1 to 3 hours on 8 H100, reckoned with 6 FLOP
# a weight and token at 10 to 25% of the peak, if AbsTopK and the prune do not dominate. Not measured.
out_dir = "out/sparse_python"
dataset = "codeparrot"

target_l0_fraction = 1 / 64

# 512 sequences of 256 tokens in a step, as in the paper
batch_size = 64
gradient_accumulation_steps = 8
max_iters = 76000
eval_interval = 1000
eval_iters = 48
log_every_n_steps = 10
