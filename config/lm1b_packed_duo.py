# Duo on the One Billion Word benchmark (LM1B) with its sentences packed end to end.
#     python prepare.py lm1b_packed
#     torchrun --nproc_per_node=8 train.py config/lm1b_packed_duo.py
# Published: test PPL 33.7 (MDLM 31.8; without the curriculum 36.7).
from pathlib import Path
exec((Path(__file__).parent / 'lm1b_duo.py').read_text())  # as lm1b_duo.py, except:
dataset = 'lm1b_packed'      # BERT's WordPiece; a row is [CLS], 126 tokens of the stream, [CLS]
out_dir = 'out-lm1b-packed-duo'
