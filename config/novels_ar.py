# The autoregressive baseline of novels_duo.py; it also judges that model's texts. Validation: 1.71
# bits per byte, PPL 59.5.
#     python train.py config/novels_ar.py
from pathlib import Path
exec((Path(__file__).parent / 'novels_duo.py').read_text())  # as novels_duo.py, except:
objective = 'ar'
out_dir = 'out-novels-ar'
max_iters = 2000
