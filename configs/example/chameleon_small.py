"""A small VQGAN of Chameleon's kind (7 M parameters), of which `checkpoints/chameleon_small` holds trained weights.

Norms share their channels among 4 groups instead of 32: with as many groups as channels a norm takes away each
channel's mean, and with it the colour of the picture.
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
            ch=16,
            ch_mult=[1, 2, 4, 8, 12],
            num_res_blocks=1,
            num_groups=4,
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
    crop_share=(0.3, 0.8),
    cache=True,
)
global_seed = 1
global_batch_size = 8
max_steps = 3000
linear_start = True  # PCA and least squares: 22 dB before the first update, where a drawn network takes hours to 17
fit_codebooks = "kmeans"
freeze_encoder = True  # at higher rates the encoder ran away from its codes
lr = 1e-4
beta2 = 0.99
lr_decay_style = "cosine"
lr_decay_ratio = 0.1
warmup = 0.01
max_grad_norm = 1.0
mixed_precision = "bf16"
ema = True
ema_decay = 0.998
num_workers = 0
log_every = 20
ckpt_every = 250
