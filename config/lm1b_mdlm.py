# The masked-diffusion baseline on LM1B. Published: test PPL 27.0.
from pathlib import Path
exec((Path(__file__).parent / 'lm1b_duo.py').read_text())   # all settings of lm1b_duo.py, save these

objective = 'mdlm'
out_dir = 'out-lm1b-mdlm'
wandb_run_name = 'lm1b-mdlm'
