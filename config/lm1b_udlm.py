# Duo without its curriculum (UDLM) on LM1B. Published: test PPL 31.3.
from pathlib import Path
exec((Path(__file__).parent / 'lm1b_duo.py').read_text())   # all settings of lm1b_duo.py, save these

curriculum_iters = 0
out_dir = 'out-lm1b-udlm'
wandb_run_name = 'lm1b-udlm'
