# The masked-diffusion baseline on the T4 recipe's data. No number was reported.
from pathlib import Path
exec((Path(__file__).parent / 'tiny_t4_duo.py').read_text())  # as tiny_t4_duo.py, except:
objective = 'mdlm'
out_dir = 'out-tiny-t4-mdlm'
