# The autoregressive baseline of the T4 set-up. Reported: validation PPL 321.2 (NLL 5.772, BPD 8.327).
from pathlib import Path
exec((Path(__file__).parent / 'tiny_t4_duo.py').read_text())   # all settings of tiny_t4_duo.py, save these

objective = 'ar'
out_dir = 'out-tiny-t4-ar'
wandb_run_name = 'tiny-t4-ar'
