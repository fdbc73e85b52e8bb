# Discrete consistency distillation of the OpenWebText Duo, the paper's: 5 rounds of 10K steps of 128 rows.
#     torchrun --nproc_per_node=8 train.py config/owt_dcd.py        # after config/owt_duo.py
# Published, Gen-PPL by GPT-2 large with the greedy tail: 69.6 in 8 steps, 46.3 in 32 (without it 111.9, 61.3).
from pathlib import Path
exec((Path(__file__).parent / 'owt_duo.py').read_text())   # all settings of owt_duo.py, save these

objective = 'dcd'
init_from = 'out-owt-duo'            # its averaged weights
out_dir = 'out-owt-dcd'
wandb_run_name = 'owt-dcd'
batch_size = 16
dcd_round_iters = 10_000
learning_rate = 6e-5
max_iters = 50_000
warmup_iters = 500
ema_decay = 0.999
