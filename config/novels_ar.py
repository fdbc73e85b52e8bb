# The autoregressive twin of novels_duo.py, which judges its texts.
from pathlib import Path
exec((Path(__file__).parent / 'novels_duo.py').read_text())  # as novels_duo.py, except:
objective = 'ar'
out_dir = 'out-novels-ar'
max_iters = 2000
