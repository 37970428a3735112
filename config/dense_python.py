# The dense twin of sparse_python.py: the same shapes, data and steps, nothing pruned and no AbsTopK.
#   torchrun --nproc_per_node=8 train.py config/dense_python.py
out_dir = "out/dense_python"
dataset = "codeparrot"

target_l0_fraction = 1.0
activation_topk_fraction = 1.0

batch_size = 64
gradient_accumulation_steps = 8
max_iters = 76000
eval_interval = 1000
eval_iters = 48
log_every_n_steps = 10
