# Discrete consistency distillation (DCD) of the OpenWebText Duo, the paper's recipe: 5 rounds of
# 10K steps of 128 rows. (The authors' code starts from the raw weights, not from their EMA, and
# leaves the teacher's dropout on; here it starts from the EMA, with a teacher without dropout.)
#     torchrun --nproc_per_node=8 train.py config/owt_dcd.py     # after config/owt_duo.py
# Published, Gen-PPL by GPT-2 large with the greedy tail: 69.6 in 8 steps, 46.3 in 32 (without it
# 111.9 and 61.3).
from pathlib import Path
exec((Path(__file__).parent / 'owt_duo.py').read_text())  # as owt_duo.py, except:
objective = 'dcd'
init_from = 'out-owt-duo'    # its EMA weights
out_dir = 'out-owt-dcd'
dcd_rounds = 5
batch_size = 16
learning_rate = 6e-5
max_iters = 50_000
warmup_iters = 500
ema_decay = 0.999
