# Distils what `python train.py` left in out/, with the paper's leads: two minutes on two cores. It
# gains little (docs/results.md).
#     python train.py config/stdlib_dcd.py
objective = 'dcd'
init_from = 'out'                    # its EMA weights
out_dir = 'out-dcd'
dcd_rounds = 5                       # the lead grows from 1/512 to 16/512
max_iters = 1000
optimizer = 'adamw'
learning_rate = 3e-4
warmup_iters = 50
cooldown_frac = 0
