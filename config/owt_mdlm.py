# The masked-diffusion baseline on OpenWebText. Published: validation PPL 23.2.
from pathlib import Path
exec((Path(__file__).parent / 'owt_duo.py').read_text())  # as owt_duo.py, except:
objective = 'mdlm'
out_dir = 'out-owt-mdlm'
