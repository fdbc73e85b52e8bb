# Distils what `python train.py` left in out/, by the paper's leads: two minutes on two cores. It gains little, as that
# network is too unsure of its words (see README.md); config/bytes_dcd.py shows more.
objective = 'dcd'
init_from = 'out'                    # its averaged weights
out_dir = 'out-dcd'
dcd_round_iters = 200                # 5 rounds: delta from 1/512 to 16/512
max_iters = 1000
learning_rate = 3e-4
warmup_iters = 50
cooldown_iters = 0
eval_interval = 500
