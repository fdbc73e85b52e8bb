# The built-in text on one GPU of 15 GB or more: about five minutes (estimated for a T4 in fp16, not
# measured).
#     python train.py config/stdlib_gpu.py
out_dir = 'out-stdlib-gpu'

batch_size = 64
block_size = 256

n_layer = 8
n_head = 6
n_embd = 384
dropout = 0.1                # the 2.6M tokens are seen many times, which overfits without it

curriculum_frac = 0.75
optimizer = 'adamw'
learning_rate = 1e-3
max_iters = 4000
warmup_iters = 200
ema_decay = 0.998

eval_interval = 1000
eval_iters = 12
compile = True
