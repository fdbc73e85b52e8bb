# The autoregressive baseline on OpenWebText. Published: validation PPL 17.5.
from pathlib import Path
exec((Path(__file__).parent / 'owt_duo.py').read_text())   # all settings of owt_duo.py, save these

objective = 'ar'
out_dir = 'out-owt-ar'
wandb_run_name = 'owt-ar'
