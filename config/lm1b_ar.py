# The autoregressive baseline on LM1B. Published: test PPL 22.3.
from pathlib import Path
exec((Path(__file__).parent / 'lm1b_duo.py').read_text())  # as lm1b_duo.py, except:
objective = 'ar'
out_dir = 'out-lm1b-ar'
