# The paper-like run: 8 GPUs, Python code, 105 million parameters of which 1.6 million stay. First, on one machine:
#   python prepare.py --dataset=codeparrot/codeparrot-clean-train --text_column=content --name=codeparrot --max_tokens=10_000_000_000
#   torchrun --nproc_per_node=8 train.py config/sparse_python.py
# 76,000 steps of 131,072 tokens are 10 billion tokens, one pass over the data. Expected on 8 H100: about 3 hours, an
# estimate from 6 FLOPs a parameter and token at a quarter of the peak, not a measurement.
out_dir = "out/sparse_python"
dataset = "codeparrot"

target_l0_fraction = 1 / 64  # model and optimizer: the defaults of train.py

batch_size = 64  # x 8 = the paper's 512 sequences of 256 tokens in a step
gradient_accumulation_steps = 8
max_iters = 76000
eval_interval = 1000
eval_iters = 50
log_every_n_steps = 10
wandb_log = False
