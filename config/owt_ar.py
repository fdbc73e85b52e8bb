# The autoregressive baseline on OpenWebText. Published: validation PPL 17.5.
from pathlib import Path
exec((Path(__file__).parent / 'owt_duo.py').read_text())  # as owt_duo.py, except:
objective = 'ar'
out_dir = 'out-owt-ar'
