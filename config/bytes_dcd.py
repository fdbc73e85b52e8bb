# Distils the model of bytes_duo.py. The network is small, so the teacher's lead in time is larger
# than the paper's, and the steps are fewer.
#     python train.py config/bytes_dcd.py     # after config/bytes_duo.py
from pathlib import Path
exec((Path(__file__).parent / 'bytes_duo.py').read_text())  # as bytes_duo.py, except:
objective = 'dcd'
init_from = 'out-bytes'      # its EMA weights
out_dir = 'out-bytes-dcd'
dcd_delta = 1 / 64
dcd_rounds = 3               # leads of 1/64, 1/32, 1/16
max_iters = 750
learning_rate = 5e-4
warmup_iters = 50
eval_interval = 250
