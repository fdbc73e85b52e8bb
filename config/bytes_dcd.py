# Distils what bytes_duo.py left: larger leads in fewer steps than the paper's, for a small network and little time.
from pathlib import Path
exec((Path(__file__).parent / 'bytes_duo.py').read_text())   # all settings of bytes_duo.py, save these

objective = 'dcd'
init_from = 'out-bytes'
out_dir = 'out-bytes-dcd'
dcd_delta = 1 / 64
dcd_round_iters = 250                # 3 rounds: 1/64, 1/32, 1/16
max_iters = 750
learning_rate = 5e-4
warmup_iters = 50
cooldown_iters = 250
eval_interval = 250
