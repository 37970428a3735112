# A weight-sparse transformer on the Python standard library, in minutes on two CPU cores:
#   python prepare.py && python train.py config/quickstart.py && python sample.py --out_dir=out/quickstart
out_dir = "out/quickstart"
dataset = "python_stdlib"

# one layer and a short context: on a CPU, many updates on many different texts matter most
n_layer = 1
d_model = 256
block_size = 64
use_positional_embeddings = True  # the paper's models have none; here they cost nothing, and show order

target_l0_fraction = 1 / 16
sparsity_anneal_end_fraction = 0.2  # a run as short as this one needs its time at the target
learning_rate = 1.8e-2  # the best of 1.3e-2, 1.8e-2 and 2.5e-2

batch_size = 16
gradient_accumulation_steps = 2
max_iters = 2200
eval_interval = 550
eval_iters = 60  # half of val
log_every_n_steps = 10
compile = False  # at this size the compiler takes longer than it saves
