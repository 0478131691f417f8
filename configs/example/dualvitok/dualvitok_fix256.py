"""DualViTok at full size, trained at 256 x 256: the sizes of the any-ratio model beside this file, other weights."""

import runpy
from pathlib import Path

_anyres = runpy.run_path(str(Path(__file__).with_name("dualvitok_anyres_max512.py")))
vq_model = dict(type="DualViTok", config=dict(_anyres["vq_model"]["config"], pixel_drop_rate=0.1))

# how it was trained: read by vision_tokenizer/tokenizer/train_dualvitok.py alone
vq_loss = _anyres["vq_loss"]
data_args = dict(
    dataset="imagenet",
    augment="dualvitok_fix_resolution_train",
    resolution=256,
    per_proc_batch_size=8,
)
global_seed = 1
global_batch_size = 256
gradient_accumulation_steps = 1
epochs = 21
lr = 1e-4
beta1 = 0.9
beta2 = 0.95
max_grad_norm = 1.0
mixed_precision = "bf16"
ema = False
vq_ckpt = None
num_workers = 8
log_every = 100
ckpt_every = 5000
