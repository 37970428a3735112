# The default model, at the paper's target, on all Python text of one machine, in minutes on one GPU:
#   mkdir text && ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"/* text/
#   rm -f text/*-packages; ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" text/packages
#   python prepare.py --dataset='text/**/*.py' --name=python_installed
#   python train.py config/one_gpu.py
# Its dense twin:
#   python train.py config/one_gpu.py --target_l0_fraction=1 --activation_topk_fraction=1 \
#       --learning_rate=8e-4 --out_dir=out/one_gpu_dense
out_dir = "out/one_gpu"
dataset = "python_installed"

target_l0_fraction = 1 / 64
sparsity_anneal_end_fraction = 0.3  # a run as short as this one needs its time at the target
learning_rate = 4.8e-3

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 3400
eval_interval = 850
eval_iters = 40
log_every_n_steps = 10
