# Discrete consistency distillation (DCD) of the LM1B Duo by the recipe for OpenWebText: 5 rounds of
# 10K steps of 128 rows. (The authors' script for LM1B is for packed rows, with other settings.)
#     torchrun --nproc_per_node=8 train.py config/lm1b_dcd.py     # after config/lm1b_duo.py
from pathlib import Path
exec((Path(__file__).parent / 'lm1b_duo.py').read_text())  # as lm1b_duo.py, except:
objective = 'dcd'
init_from = 'out-lm1b-duo'   # its EMA weights
out_dir = 'out-lm1b-dcd'
dcd_rounds = 5
batch_size = 16
learning_rate = 6e-5
max_iters = 50_000
warmup_iters = 500
ema_decay = 0.999
