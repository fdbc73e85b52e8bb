# The masked-diffusion baseline of the T4 set-up; no number was reported.
from pathlib import Path
exec((Path(__file__).parent / 'tiny_t4_duo.py').read_text())   # all settings of tiny_t4_duo.py, save these

objective = 'mdlm'
out_dir = 'out-tiny-t4-mdlm'
wandb_run_name = 'tiny-t4-mdlm'
