# Duo without its curriculum (UDLM) on LM1B. Published: test PPL 31.3.
from pathlib import Path
exec((Path(__file__).parent / 'lm1b_duo.py').read_text())  # as lm1b_duo.py, except:
curriculum_frac = 0
out_dir = 'out-lm1b-udlm'
