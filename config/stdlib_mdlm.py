# The built-in text with train.py's defaults, but for the objective: a baseline for the laptop demo.
objective = 'mdlm'
out_dir = 'out-mdlm'
