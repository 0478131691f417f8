"""DualViTok at full size, trained on aspect ratios of about 512 x 512 pixels: 1.35 G parameters, 0.79 G to encode."""

vq_model = dict(
    type="DualViTok",
    config=dict(
        pixel_drop_rate=None,  # of the pixel codes of a chosen image, in training
        pixel_drop_batch_rate=0.1,
        pixel_noise_type="random",
        semantic_encoder=dict(
            semantic_encoder="Emova-ollm/qwen2vit600m",  # its sizes; its weights are in the checkpoint
            num_blocks=4,
            embed_dim=1280,
            z_channels=32,
            proj_layer="linear",
            target_mlp="norm",
        ),
        semantic_quantizer=dict(type="SimVQ", dim=32, codebook_size=32768, rotation_trick=False),
        semantic_decoder=dict(
            num_blocks=4,
            embed_dim=1280,
            z_channels=32,
            output_channels=3584,
            proj_layer="linear_norm",
        ),
        pixel_encoder=dict(
            ch=128,
            ch_mult=[1, 1, 2, 2, 4],
            num_res_blocks=2,
            attn_resolutions=[4],  # levels, counted from 0 at full resolution
            z_channels=32,
            embed_dim=32,
            use_dc_up_down_blocks=True,
        ),
        pixel_quantizer=dict(type="SimVQ", dim=32, codebook_size=98304, rotation_trick=False),
        pixel_decoder=dict(
            ch=384,
            ch_mult=[1, 1, 2, 2, 4],
            num_res_blocks=2,
            attn_resolutions=[4],
            z_channels=64,
            embed_dim=64,  # both quantizers' dims: what the decoder's norms see
            use_dc_up_down_blocks=True,
        ),
    ),
)

# how it was trained: read by vision_tokenizer/tokenizer/train_dualvitok.py alone
vq_loss = dict(
    reconstruction_loss="l2",
    reconstruction_weight=1.0,
    perceptual_weight=1.0,
    codebook_weight=1.0,
    semantic_reconstruction="cos",
    semantic_reconstruction_weight=1.0,
    semantic_codebook_weight=1.0,
    semantic_weight=1.0,
    disc_loss="hinge",
    gen_adv_loss="hinge",
    disc_start=20000,
    disc_weight=0.5,
    disc_adaptive_weight=False,
)
data_args = dict(
    dataset="folder",
    augment="dualvitok_anyres_resolution_train",
    min_pixels=32 * 32,
    max_pixels=512 * 512,
    per_proc_batch_size=2,
)
use_group_image_resolution = True
training_with_anyres = True
global_seed = 3
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
ckpt_every = 2000
