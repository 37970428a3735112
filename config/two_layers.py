# Two layers, in about half an hour on two CPU cores: a model that can do most of the tasks of circuit.py.
#   python train.py config/two_layers.py && python circuit.py --out_dir=out/two_layers --task=string_end
out_dir = "out/two_layers"
dataset = "python_stdlib"

n_layer = 2
d_model = 256
block_size = 64
use_positional_embeddings = True  # as in the quickstart

target_l0_fraction = 1 / 16
sparsity_anneal_end_fraction = 0.2  # as in the quickstart
learning_rate = 1.3e-2  # of a run three times as long as the quickstart; 1.8e-2 was not tried

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 7400
eval_interval = 1850
eval_iters = 30  # half of val
log_every_n_steps = 10
compile = False  # at this size the compiler takes longer than it saves
