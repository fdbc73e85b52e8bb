# The masked-diffusion baseline on LM1B. Published: test PPL 27.0.
from pathlib import Path
exec((Path(__file__).parent / 'lm1b_duo.py').read_text())  # as lm1b_duo.py, except:
objective = 'mdlm'
out_dir = 'out-lm1b-mdlm'
