# Duo without its curriculum (UDLM) on OpenWebText. Published: validation PPL 27.4.
from pathlib import Path
exec((Path(__file__).parent / 'owt_duo.py').read_text())   # all settings of owt_duo.py, save these

curriculum_iters = 0
out_dir = 'out-owt-udlm'
wandb_run_name = 'owt-udlm'
