# The default model at the paper's target, on all Python text of one machine: two minutes on one H200.
#   mkdir text && ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"/* text/
#   rm -f text/*-packages
#   ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" text/site-packages
#   python prepare.py --dataset='text/**/*.py' --name=python_installed
#   python train.py config/one_gpu.py
# and its dense twin:
#   python train.py config/one_gpu.py --target_l0_fraction=1 --activation_topk_fraction=1 \
#       --learning_rate=2e-4 --out_dir=out/one_gpu_dense
out_dir = "out/one_gpu"
dataset = "python_installed"

target_l0_fraction = 1 / 64
sparsity_anneal_end_fraction = 0.3  # a run as short as this one needs its time at the target
learning_rate = 4.8e-3  # in 200 steps 6.4e-3 was the best of 1.6e-3 to 1.28e-2; more steps want less

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 1500
eval_interval = 375
eval_iters = 20
log_every_n_steps = 10
