# Distils what `python train.py` left in out/: a few minutes on two cores.
objective = 'dcd'
init_from = 'out'                    # its averaged weights
out_dir = 'out-dcd'
dcd_round_iters = 200                # 5 rounds: delta from 1/512 to 16/512
max_iters = 1000
learning_rate = 3e-4
warmup_iters = 50
cooldown_iters = 0
eval_interval = 500
