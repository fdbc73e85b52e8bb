# Distils the model of novels_duo.py, on two CPU cores.
#     python train.py config/novels_dcd.py     # after config/novels_duo.py
from pathlib import Path
exec((Path(__file__).parent / 'novels_duo.py').read_text())  # as novels_duo.py, except:
objective = 'dcd'
init_from = 'out-novels'     # its EMA weights
out_dir = 'out-novels-dcd'
dcd_delta = 1 / 64
dcd_rounds = 3               # leads of 1/64, 1/32, 1/16
max_iters = 900
optimizer = 'adamw'
learning_rate = 5e-4
warmup_iters = 50
cooldown_frac = 0
eval_interval = 300
