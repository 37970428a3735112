# What the runs of experiments/ablations.py have in common: a model so small that one of them takes two
# minutes of one CPU core, with the paper's settings. It needs this data:
#   python prepare.py --vocab_size=512 --name=python_stdlib_512
dataset = "python_stdlib_512"  # a small vocabulary leaves most of the weights to the blocks
n_layer = 2
d_model = 128
block_size = 128
target_l0_fraction = 1 / 16

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 800
eval_interval = 800
eval_iters = 80  # all of val, nearly
log_every_n_steps = 100
device = "cpu"
compile = False
