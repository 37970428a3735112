# The paper-like run: 8 GPUs, 105 million pruned weights of which 1.6 million stay, a public corpus of Python code.
#   python prepare.py --dataset=codeparrot/codeparrot-clean-train --text_column=content --name=codeparrot \
#       --max_tokens=10_000_000_000
#   torchrun --nproc_per_node=8 train.py config/sparse_python.py
# 76,000 steps of 131,072 tokens are 10 billion tokens. Expected on 8 H100: 1 to 3 hours, from 6 FLOPs a weight and
# token at 10 to 25% of the peak in bfloat16; not measured.
out_dir = "out/sparse_python"
dataset = "codeparrot"

target_l0_fraction = 1 / 64  # model and optimizer: the defaults of train.py

batch_size = 64  # x 8 micro-batches are the paper's 512 sequences of 256 tokens in a step
gradient_accumulation_steps = 8
max_iters = 76000
eval_interval = 1000
eval_iters = 48
log_every_n_steps = 10
