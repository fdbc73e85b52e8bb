# The autoregressive baseline of bytes_duo.py, which also judges its samples.
from pathlib import Path
exec((Path(__file__).parent / 'bytes_duo.py').read_text())  # as bytes_duo.py, except:
objective = 'ar'
out_dir = 'out-bytes-ar'
max_iters = 2000
cooldown_frac = 0.4
