# A weight-sparse transformer on the Python standard library, in minutes on a CPU:
#   python prepare.py && python train.py config/quickstart.py && python sample.py --out_dir=out/quickstart
out_dir = "out/quickstart"
dataset = "python_stdlib"

n_layer = 2
d_model = 256
d_head = 16
block_size = 128

target_l0_fraction = 1 / 16
learning_rate = 2.5e-2

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 1000
eval_interval = 250
eval_iters = 20
log_every_n_steps = 10
