# The built-in text byte by byte: a network surer of its next word than train.py's own, and so one that distils.
#     python prepare.py stdlib --tokenizer bytes --name stdlib_bytes
#     python train.py config/bytes_duo.py                # then bytes_ar.py, to judge, and bytes_dcd.py
dataset = 'stdlib_bytes'
out_dir = 'out-bytes'
block_size = 256
batch_size = 4
max_iters = 3000
curriculum_iters = 2400
gamma_max = -1.75
cooldown_iters = 1000
eval_interval = 1000
