# The autoregressive baseline on the T4 recipe's data. Reported: validation PPL 321.2 (NLL 5.772,
# BPD 8.327).
from pathlib import Path
exec((Path(__file__).parent / 'tiny_t4_duo.py').read_text())  # as tiny_t4_duo.py, except:
objective = 'ar'
out_dir = 'out-tiny-t4-ar'
