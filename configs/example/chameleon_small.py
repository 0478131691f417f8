"""A small VQGAN of Chameleon's kind (4 M parameters), for train_dualvitok.py.

No weights of it come with the repository: in some hundred updates on a CPU it stayed a blur (below 15 dB on pictures
that it never saw), where the DualViTok beside it, whose decoder sees the codes at every level, had long shown pictures.
Give it a GPU and thousands of updates.
"""

vq_model = dict(
    type="ChameleonVQGAN",
    config=dict(
        embed_dim=16,
        n_embed=8192,
        ddconfig=dict(
            double_z=False,
            z_channels=32,
            resolution=512,
            in_channels=3,
            out_ch=3,
            ch=32,
            ch_mult=[1, 1, 2, 4, 4],
            num_res_blocks=1,
            attn_resolutions=[],
        ),
    ),
)

# how it is trained: read by vision_tokenizer/tokenizer/train_dualvitok.py alone
vq_loss = dict(
    reconstruction_loss="l2",
    reconstruction_weight=4.0,
    l1_weight=0.25,
    perceptual_weight=0.0,  # no LPIPS: its weights cannot be had offline
    codebook_weight=1.0,
    disc_weight=0.0,  # no discriminator
)
data_args = dict(
    augment="random_crop",
    resolution=128,
    crop_share=(0.2, 0.7),
    cache=True,
)
global_seed = 1
global_batch_size = 8
max_steps = 20000
lr = 8e-4
code_transform_lr_scale = 10.0
fit_codebooks = "covariance"
max_grad_norm = 1.0
mixed_precision = "bf16"
ema = True
ema_decay = 0.995
num_workers = 0
log_every = 25
ckpt_every = 175
