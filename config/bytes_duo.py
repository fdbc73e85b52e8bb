# The built-in text byte by byte. With only 256 tokens the network predicts each with more certainty
# than train.py's default one, which was expected to help distillation.
#     python prepare.py stdlib --tokenizer bytes --name stdlib_bytes
#     python train.py config/bytes_duo.py     # then bytes_ar.py, to judge samples, and bytes_dcd.py
dataset = 'stdlib_bytes'
out_dir = 'out-bytes'
block_size = 256
batch_size = 4
max_iters = 3000
gamma_max = -1.75
cooldown_frac = 1 / 3
eval_interval = 1000

optimizer = 'adamw'
learning_rate = 1.5e-3
