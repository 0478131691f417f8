"""Every part of DualViTok, narrower (8 M parameters): the tokenizer in checkpoints/dualvitok_small, and its recipe.

exps/train-small-tokenizer.sh runs the whole recipe; what it sets beside this file differs between its two stages.
"""

vq_model = dict(
    type="DualViTok",
    config=dict(
        semantic_encoder=dict(
            vit=dict(depth=4, embed_dim=128, hidden_size=192, num_heads=4, mlp_ratio=4),
            num_blocks=2,
            embed_dim=128,
            z_channels=16,
            proj_layer="linear",
            target_mlp="norm",
        ),
        semantic_quantizer=dict(type="SimVQ", dim=16, codebook_size=4096, rotation_trick=False),
        semantic_decoder=dict(
            num_blocks=2,
            embed_dim=128,
            z_channels=16,
            output_channels=192,
            proj_layer="linear_norm",
        ),
        pixel_encoder=dict(
            ch=32,
            ch_mult=[1, 1, 2, 4, 4],
            num_res_blocks=1,
            attn_resolutions=[4],  # levels, counted from 0 at full resolution
            z_channels=16,
            embed_dim=16,
            use_dc_up_down_blocks=True,
        ),
        pixel_quantizer=dict(type="SimVQ", dim=16, codebook_size=32768, rotation_trick=False),
        pixel_decoder=dict(
            ch=32,
            ch_mult=[1, 1, 2, 4, 4],
            num_res_blocks=1,
            attn_resolutions=[4],
            z_channels=32,
            embed_dim=32,  # both quantizers' dims: what the decoder's norms see
            use_dc_up_down_blocks=True,
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
    semantic_weight=1.0,
    semantic_codebook_weight=1.0,
    semantic_reconstruction="cos",
    semantic_reconstruction_weight=0.1,
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
max_steps = 1200
lr = 8e-4
code_transform_lr_scale = 10.0
fit_codebooks = "covariance"
max_grad_norm = 1.0
mixed_precision = "bf16"
ema = True
ema_decay = 0.995
num_workers = 0
log_every = 25
ckpt_every = 150
