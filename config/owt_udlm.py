# Duo without its curriculum (UDLM) on OpenWebText. Published: validation PPL 27.4.
from pathlib import Path
exec((Path(__file__).parent / 'owt_duo.py').read_text())  # as owt_duo.py, except:
curriculum_frac = 0
out_dir = 'out-owt-udlm'
