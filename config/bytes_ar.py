# The autoregressive baseline, and judge, of bytes_duo.py.
from pathlib import Path
exec((Path(__file__).parent / 'bytes_duo.py').read_text())   # all settings of bytes_duo.py, save these

objective = 'ar'
out_dir = 'out-bytes-ar'
max_iters = 2000
cooldown_iters = 800
